"""That nothing writes to a folder while it is read.

Tensors are read one by one, some of them minutes after the first: of a folder that is copied to or
trained in meanwhile, a conversion would make a mixture of two models.
"""

from pathlib import Path

from megatron_memory.exceptions import CheckpointError

_Stamp = tuple[int, int, int]


class Unchanged:
    """Files as they were at first sight: by size, time of their last change, and inode.

    Args:
        folder: whose files, without those of its folders, are watched. A folder that is not there
            is for its reader to tell.
    """

    def __init__(self, folder: Path | None):
        self._stamps: dict[Path, _Stamp | None] = {}
        if folder is not None:
            self.watch(folder)

    def watch(self, place: Path) -> None:
        """Watch a file, or those of one more folder."""
        files = [path for path in place.iterdir() if path.is_file()] if place.is_dir() else [place]
        for file in files:
            self._stamps.setdefault(file, _stamp(file))

    def check(self) -> None:
        """Call it when everything has been read. Files that came later do not matter.

        Raises:
            CheckpointError: names the files that are not what they were.
        """
        changed = [path for path, stamp in self._stamps.items() if _stamp(path) != stamp]
        if changed:
            raise CheckpointError(
                f"{', '.join(map(str, changed[:8]))}: changed or removed while the folder was "
                "read, so that the result could be of two models, and is not kept. Repeat it once "
                "nothing writes there any more"
            )


def _stamp(path: Path) -> _Stamp | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns, status.st_ino
