"""Install into the environment of this Python with uv, under the settings that pip would use here.

uv reads neither pip.conf nor the PIP_ variables, so an index with the pinned build of torch would be missed:

    .venv/bin/python scripts/uv_install.py -c constraints.txt -e .
"""

import os
import shlex
import subprocess
import sys

OPTIONS = {"constraint": "--constraint", "trusted-host": "--allow-insecure-host"}
# Addresses may contain user:token@, and `ps` shows the command line to every user: option -> (variable, separator).
VARIABLES = {
    "index-url": ("UV_DEFAULT_INDEX", " "),
    "extra-index-url": ("UV_INDEX", " "),
    "find-links": ("UV_FIND_LINKS", ","),
}
ORDER = ("global", "install", ":env:")  # a later one replaces the same setting of an earlier one


def pip_settings() -> dict[str, str]:
    """Return pip's settings for `pip install`, from its files and from the environment."""
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    ).stdout
    found: dict[str, tuple[int, str]] = {}
    for line in listed.splitlines():
        name, _, value = line.partition("=")
        section, _, option = name.rpartition(".")
        if section in ORDER and ORDER.index(section) >= found.get(option, (0, ""))[0]:
            found[option] = (ORDER.index(section), shlex.split(value)[0] if value else "")
    return {option: value for option, (_, value) in found.items()}


def main() -> None:
    """Replace this process with uv."""
    settings = pip_settings()
    # Like pip, take the best version of all indexes: torch's own index has the build for this machine.
    command = ["uv", "pip", "install", "--quiet", "--python", sys.executable, "--index-strategy", "unsafe-best-match"]
    for option, word in OPTIONS.items():
        command += [part for value in settings.get(option, "").split() for part in (word, value)]
    if settings.get("no-index", "").lower() in ("1", "true", "yes", "on"):
        command.append("--no-index")
    named = {name: by.join(settings[o].split()) for o, (name, by) in VARIABLES.items() if settings.get(o, "").strip()}
    environment = os.environ | named
    if "cert" in settings:
        environment.setdefault("SSL_CERT_FILE", settings["cert"])
    os.execvpe(command[0], [*command, *sys.argv[1:]], environment)


if __name__ == "__main__":
    main()
