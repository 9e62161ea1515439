"""The profiles of a folder."""

from __future__ import annotations

from pathlib import Path

from calibrators.profiles import SUFFIX, Profile, ProfileError, load


def read(folder: Path) -> dict[str, Profile]:
    """Profiles by name, sorted: every `*.json` in the folder itself.

    Raises:
        ProfileError: there is no such folder, or one of its files is no profile.
    """
    if not folder.is_dir():
        raise ProfileError(folder.name, "", "there is no such folder")
    profiles = [load(path) for path in sorted(folder.glob(f"*{SUFFIX}"))]
    return {profile.name: profile for profile in profiles}
