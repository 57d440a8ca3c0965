"""The two commands as a user runs them, and what they leave on disk."""

import pytest

from convert import cli

COMMANDS = {"jax": cli.convert_jax_model_to_pytorch, "torch": cli.convert_pytorch_model_to_jax}


def run(capsys, kind, *arguments):
    """Runs the command for a checkpoint of a kind: the exit status, standard output and error."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        COMMANDS[kind]([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    return ended.value.code, printed.out, printed.err


def converted(capsys, kind, source, output, *flags):
    """Runs a conversion that has to succeed; gives what it prints."""
    arguments = ("--checkpoint_dir", source, "--output_path", output, *flags)
    status, printed, error = run(capsys, kind, *arguments)
    assert status == 0, error
    return printed


def refused(capsys, kind, source, output, *flags):
    """Runs a conversion that has to be refused; gives the message.

    Nothing may have come to stand at the output's place, beside it or above it, and what was there
    has to be as it was.
    """
    there = next(parent for parent in output.parents if parent.is_dir())
    before = contents(there)
    arguments = ("--checkpoint_dir", source, "--output_path", output, *flags)
    status, _, error = run(capsys, kind, *arguments)
    assert status == cli.BAD_INPUT, error
    assert "Traceback" not in error
    assert contents(there) == before
    _, marked, message = error.partition(f"{COMMANDS[kind].__name__}: error: ")
    assert marked
    return message.strip()


def named_in(message, fragments):
    """Asserts that a message names all of these."""
    missing = [fragment for fragment in fragments if fragment not in message]
    assert not missing, message


def contents(folder):
    """All that is in a folder, hidden or not: the bytes of files, None for folders."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }
