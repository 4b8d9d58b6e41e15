"""Asks a trained model: open continuations, and facts with one right answer each."""

from pathlib import Path

from corpus import asked_facts

from megatron_memory.runtime import prepare_megatron

OPENINGS = ("oak (noun):", "to swim (verb):", "violin (noun):")


def ask_model(checkpoints: Path, device: str, num_questions: int) -> str:
    """What the newest checkpoint says, on one process at whatever size it was trained, as text to
    print."""
    backend = prepare_megatron(device)
    from megatron_memory.inference.generator import load_generator
    from megatron_memory.inference.options import ModelSource, Sampling
    from megatron_memory.runtime.distributed import shutdown_distributed

    generator = load_generator(ModelSource(load=str(checkpoints), device=device), backend)
    sampling = Sampling(num_tokens_to_generate=24, greedy=True)
    openings = generator.generate(OPENINGS, sampling, prepend_eod=True)
    facts = asked_facts()[:num_questions]
    questions = [_question(fact) for fact in facts]
    answers = generator.generate(questions, sampling, prepend_eod=True)
    shutdown_distributed()
    lines = ["Continuations:"]
    lines += [f"  {c.prompt} ...{c.text.rstrip()}" for c in openings]
    lines.append("\nFacts that were in the training text:")
    is_right = [_is_right(c.text, fact) for c, fact in zip(answers, facts, strict=True)]
    for completion, right in list(zip(answers, is_right, strict=True))[:6]:
        given = completion.text.split(".")[0].strip()
        lines.append(f"  {'right' if right else 'wrong'}: {completion.prompt} ... {given}")
    lines.append(f"{sum(is_right)} of {len(facts)} answers are right.")
    return "\n".join(lines)


def _question(fact: dict) -> str:
    """The fact's statement up to its answer."""
    return fact["statement"].rpartition(fact["answer"])[0].rstrip()


def _is_right(text: str, fact: dict) -> bool:
    return text.split(".")[0].strip() == fact["answer"]
