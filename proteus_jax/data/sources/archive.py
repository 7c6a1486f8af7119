"""Names of members in archives of folders, tar and zip."""

from collections.abc import Sequence
from pathlib import PurePosixPath


def leaves_archive(name: str) -> bool:
    """Returns True for a member whose name leads out of the folder that an archive is unpacked in.
    Nothing is unpacked here; what has such a name was made to harm.
    """
    path = name.replace("\\", "/")
    return path.startswith("/") or ".." in PurePosixPath(path).parts or path[1:3] == ":/"


def folder_paths(names: Sequence[str]) -> list[str]:
    """Paths of members below the folders that all of them lie in: classes come first."""
    parts = [PurePosixPath(name.replace("\\", "/")).parts for name in names]
    shared = 0
    while all(len(part) > shared + 1 and part[shared] == parts[0][shared] for part in parts):
        shared += 1
    return ["/".join(part[shared:]) for part in parts]
