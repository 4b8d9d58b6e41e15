"""Checkpoints in megatron-core's distributed format; a crash at any moment leaves the previous one.

    SAVE/latest_checkpointed_iteration.txt    the newest complete checkpoint (the tracker)
    SAVE/config.yaml                          the configuration of the run that wrote it
    SAVE/iter_0000010/                        one checkpoint, with a config.yaml of its own
    SAVE/iter_0000020.incomplete.RUN/         being written by a run, or left behind by a crash
    SAVE/writer.json                          the run that writes there, while it does
    SAVE/earlier-1/                           checkpoints that a run did not go on with

`folders` knows these names, `lease` keeps it to one writer, `save_folder` decides about what is
there, `integrity` tells whole checkpoints from damaged ones, `architecture`
compares a checkpoint's model with this run's, `changes` its other settings and, by `data_order`,
its data, `state` is what is saved, `rng_state` the generators'
part of it, `saver` and `loader` are the two directions, `schedule` settles whose settings count,
`agreement` keeps the ranks together, `writer_queue` serves the writing processes.
"""
