"""Completion scripts for Bash, Zsh and fish, from a description of the commands."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from shlex import quote


@dataclass(frozen=True, slots=True)
class Argument:
    """An option or a positional argument of a command.

    names     spellings of an option; none for a positional argument
    help      its meaning
    value     the name of its value, such as FILE; "" for an option without one
    words     what the value can be, as far as it is known
    files     whether the value is a file
    optional  whether an option's value may be left out
    repeated  whether an option may occur several times
    """

    names: tuple[str, ...]
    help: str
    value: str
    words: tuple[str, ...] = ()
    files: bool = False
    optional: bool = False
    repeated: bool = False


@dataclass(frozen=True, slots=True)
class Command:
    """A command and its arguments."""

    name: str
    help: str
    arguments: tuple[Argument, ...]

    @property
    def options(self) -> list[Argument]:
        return [argument for argument in self.arguments if argument.names]

    @property
    def positionals(self) -> list[Argument]:
        return [argument for argument in self.arguments if not argument.names]


# -- Bash -------------------------------------------------------------------------------------

_BASH = """\
# Completion of pyggml for Bash 4; made by `pyggml completion bash`.
_pyggml() {
    local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD-1]}
    local command= options=@GENERAL@ valued= words= files= key i n=0 head=
    if [[ $cur == = ]]; then  # Bash splits --option=value into three words
        cur=
    elif [[ $prev == = ]]; then
        prev=${COMP_WORDS[COMP_CWORD-2]}
    fi
    for ((i = 1; i < COMP_CWORD; i++)); do
        if [[ ${COMP_WORDS[i]} != -* ]]; then
            command=${COMP_WORDS[i]}
            break
        fi
    done
    case $command in
        '') words=@COMMANDS@ ;;
@OPTIONS@
    esac
    # Count the positional arguments before this word.
    for ((i++; i < COMP_CWORD; i++)); do
        if [[ ${COMP_WORDS[i]} == = ]]; then
            ((i++))
        elif [[ ${COMP_WORDS[i]} != -* ]]; then
            ((n++))
        elif [[ " $valued " == *" ${COMP_WORDS[i]} "* && ${COMP_WORDS[i+1]} != = ]]; then
            ((i++))
        fi
    done
    key=$n
    [[ " $valued " == *" $prev "* ]] && key=$prev
    case $command:$key in
@VALUES@
    esac
    COMPREPLY=()
    if [[ $cur == -* ]]; then
        mapfile -t COMPREPLY < <(compgen -W "$options" -- "$cur")
    elif [[ -n $files ]]; then
        compopt -o filenames 2>/dev/null
        mapfile -t COMPREPLY < <(compgen -f -- "$cur")
    elif [[ -n $words ]]; then
        [[ $cur == *,* ]] && head=${cur%,*},  # a list such as cuda,numpy
        mapfile -t COMPREPLY < <(compgen -P "$head" -W "$words" -- "${cur##*,}")
    fi
}
complete -F _pyggml pyggml
"""


def bash(commands: Sequence[Command], general: Sequence[Argument]) -> str:
    names = [name for option in general for name in option.names]
    parts = {
        "GENERAL": quote(" ".join(names)),
        "COMMANDS": quote(" ".join(command.name for command in commands)),
        "OPTIONS": "\n".join(_bash_options(command, names) for command in commands),
        "VALUES": "\n".join(line for command in commands for line in _bash_values(command)),
    }
    return re.sub(r"@(\w+)@", lambda match: parts[match[1]], _BASH)


def _bash_options(command: Command, general: Sequence[str]) -> str:
    names = [name for option in command.options for name in option.names]
    valued = [name for option in command.options if option.value for name in option.names]
    options = quote(" ".join(dict.fromkeys([*names, *general])))
    return f"        {command.name}) options={options} valued={quote(' '.join(valued))} ;;"


def _bash_values(command: Command) -> Iterator[str]:
    keys = [(name, option) for option in command.options for name in option.names]
    keys += [(str(i), argument) for i, argument in enumerate(command.positionals)]
    for key, argument in keys:
        if argument.files:
            yield f"        {command.name}:{key}) files=1 ;;"
        elif argument.words:
            yield f"        {command.name}:{key}) words={quote(' '.join(argument.words))} ;;"


# -- Zsh --------------------------------------------------------------------------------------

_ZSH = """\
#compdef pyggml
# Completion of pyggml for Zsh; made by `pyggml completion zsh`.
_pyggml() {
    local context state state_descr line
    typeset -A opt_args
    _arguments -C @GENERAL@ '1:command:->command' '*::argument:->argument'
    case $state in
        command)
            local -a commands=(@COMMANDS@)
            _describe command commands ;;
        argument)
            case $words[1] in
@ARGUMENTS@
            esac ;;
    esac
}
if [[ $zsh_eval_context[-1] == loadautofunc ]]; then
    _pyggml "$@"
else
    compdef _pyggml pyggml
fi
"""


def zsh(commands: Sequence[Command], general: Sequence[Argument]) -> str:
    parts = {
        "GENERAL": " ".join(line for option in general for line in _zsh_argument(option)),
        "COMMANDS": " ".join(quote(f"{command.name}:{command.help}") for command in commands),
        "ARGUMENTS": "\n".join(_zsh_command(command, general) for command in commands),
    }
    return re.sub(r"@(\w+)@", lambda match: parts[match[1]], _ZSH)


def _zsh_command(command: Command, general: Sequence[Argument]) -> str:
    known = {name for option in command.options for name in option.names}
    rest = [option for option in general if not known.intersection(option.names)]
    lines = [line for each in (*command.arguments, *rest) for line in _zsh_argument(each)]
    specs = " \\\n".join(f"                    {line}" for line in lines)
    return f"                {command.name}) _arguments \\\n{specs} ;;"


def _zsh_argument(argument: Argument) -> Iterator[str]:
    """The specifications of one argument for `_arguments`."""
    value = argument.value.replace(":", "\\:")
    if argument.files:
        value += ":_files"
    elif argument.words:
        value += f":_sequence compadd - {' '.join(map(quote, argument.words))}"
    elif value:
        value += ": "
    if not argument.names:
        yield quote(f":{value}")
    text = re.sub(r"([][\\])", r"\\\1", argument.help)
    others = "*" if argument.repeated else f"({' '.join(argument.names)})"
    colon = "" if not argument.value else "::" if argument.optional else ":"
    for name in argument.names:
        yield quote(f"{others}{name}[{text}]{colon}{value}")


# -- fish -------------------------------------------------------------------------------------


def fish(commands: Sequence[Command], general: Sequence[Argument]) -> str:
    lines = ["# Completion of pyggml for fish; made by `pyggml completion fish`."]
    lines += ["complete -c pyggml -f"]
    lines += [f"complete -c pyggml {_fish_argument(option)}" for option in general]
    for command in commands:
        about = f"-a {command.name} -d {_fish_quote(command.help)}"
        lines.append(f"complete -c pyggml -n __fish_use_subcommand {about}")
        seen = f"complete -c pyggml -n '__fish_seen_subcommand_from {command.name}'"
        arguments = [a for a in command.arguments if a.names or a.files or a.words]
        lines += [f"{seen} {_fish_argument(argument)}" for argument in arguments]
    return "\n".join(lines) + "\n"


def _fish_argument(argument: Argument) -> str:
    """The switches of `complete` for one argument."""
    words = []
    for name in argument.names:
        # Not -s for single letters: fish would read -mla as -m with the value la.
        words += ["-l" if name.startswith("--") else "-o", name.lstrip("-")]
    if argument.files:
        words += ["-r", "-F"] if argument.names else ["-F"]
    elif argument.names and argument.value and not argument.optional:
        words += ["-x"]
    if argument.words:
        words += ["-a", _fish_quote(" ".join(argument.words))]
    if argument.names:
        words += ["-d", _fish_quote(argument.help)]
    return " ".join(words)


def _fish_quote(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


WRITERS: dict[str, Callable[[Sequence[Command], Sequence[Argument]], str]] = {
    "bash": bash,
    "zsh": zsh,
    "fish": fish,
}
