#!/usr/bin/python
"""Ansible module: a daemon on a machine without systemd, such as a container or the loopback cluster of the tests."""

import fcntl
import os
import signal
import subprocess
import time

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
module: daemon
short_description: Run a daemon where there is no systemd
description:
  - Starts a command that stays in the foreground in a session of its own, and keeps its process id in a file.
  - A process id that belongs to another program by now counts as stopped.
options:
  command: {description: The program and its arguments; it must not fork., type: list, elements: str, required: true}
  pid_file: {description: Where its process id is kept., type: path, required: true}
  log_file: {description: Where what it prints goes., type: path, required: true}
  state: {description: What it should be., type: str, choices: [started, restarted, stopped], default: started}
  environment: {description: Variables set for it., type: dict, default: {}}
"""

STOP_SECONDS = 30
PROVE_SECONDS = 1.0  # a daemon that dislikes its configuration ends within this time


def running(pid_file: str, program: str) -> int | None:
    """Returns the daemon's process id, or None if it does not run."""
    try:
        with open(pid_file, encoding="utf-8") as file:
            pid = int(file.read())
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            arguments = file.read().decode().split("\0")
    except (OSError, ValueError):
        return None
    return pid if any(os.path.basename(a) == os.path.basename(program) for a in arguments[:8]) else None


def stop(pid: int) -> None:
    """Ends a process, with SIGKILL if SIGTERM does not within 30 s."""
    os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + STOP_SECONDS
    while os.path.exists(f"/proc/{pid}"):
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)


def start(params: dict) -> str | None:
    """Starts the daemon. Returns what it printed last if it ended at once."""
    with open(params["log_file"], "ab") as log:
        process = subprocess.Popen(
            params["command"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd="/",
            env=os.environ | {k: str(v) for k, v in params["environment"].items()},
            start_new_session=True,
        )
    with open(params["pid_file"], "w", encoding="utf-8") as file:
        file.write(f"{process.pid}\n")
    try:
        code = process.wait(PROVE_SECONDS)
    except subprocess.TimeoutExpired:
        return None
    with open(params["log_file"], encoding="utf-8", errors="replace") as file:
        last = file.read().strip().splitlines()[-1:]
    return f"exit code {code}: {' '.join(last)}"


def main() -> None:
    """Brings the daemon into the state that was asked for."""
    module = AnsibleModule(
        argument_spec={
            "command": {"type": "list", "elements": "str", "required": True},
            "pid_file": {"type": "path", "required": True},
            "log_file": {"type": "path", "required": True},
            "state": {"choices": ["started", "restarted", "stopped"], "default": "started"},
            "environment": {"type": "dict", "default": {}},
        },
        supports_check_mode=True,
    )
    params = module.params
    program = params["command"][-1] if params["command"][0] == "setpriv" else params["command"][0]
    if module.check_mode:
        pid = running(params["pid_file"], program)
        module.exit_json(changed=params["state"] == "restarted" or (pid is None) == (params["state"] == "started"))
    with open(params["pid_file"] + ".lock", "w", encoding="utf-8") as lock:  # hosts may share a machine
        fcntl.flock(lock, fcntl.LOCK_EX)
        pid = running(params["pid_file"], program)
        if pid and params["state"] == "started":
            module.exit_json(changed=False, pid=pid)
        if pid:
            stop(pid)
        if params["state"] == "stopped":
            module.exit_json(changed=pid is not None)
        os.set_inheritable(lock.fileno(), False)
        failure = start(params)
        if failure:
            module.fail_json(msg=f"{program} ended at once with {failure}; see {params['log_file']}")
    module.exit_json(changed=True)


if __name__ == "__main__":
    main()
