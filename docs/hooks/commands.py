"""The reference of the command line, written from its parser when the site is built."""

from __future__ import annotations

import html
import re
from typing import Any

import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page

from moeopt.cli import app
from moeopt.cli.commands import COMMANDS

PAGE = "reference/commands.md"


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    return markdown + reference() if page.file.src_uri == PAGE else markdown


def reference() -> str:
    """Every command with its arguments and options, in the order of the help."""
    group: Any = typer.main.get_command(app)
    above = group.make_context("moeopt", [], resilient_parsing=True)
    parts = [""]
    for name in COMMANDS:
        command = group.commands[name]
        context = typer.Context(command, info_name=name, parent=above)
        usage = re.sub(r"[{}]|(?<=\[)\[|\](?=\])|^Usage: ", "", command.get_usage(context))
        parts.append(f"## moeopt {name}\n\n{markdown(command.help)}\n\n```text\n{usage}\n```")
        panels: dict[str, list[str]] = {}
        for parameter in command.params:
            if getattr(parameter, "hidden", False):
                continue
            default = "Arguments" if parameter.param_type_name == "argument" else "Options"
            panel = getattr(parameter, "rich_help_panel", None) or default
            names, meaning = parameter.get_help_record(context)
            names = names if names.startswith("-") else names.removesuffix(" <str>")
            panels.setdefault(panel, []).append(f"| {code(names)} | {cell(markdown(meaning))} |")
        for panel, rows in panels.items():
            parts.append("\n".join([f"<div class=options markdown>\n\n| {panel} | |", "|---|---|", *rows, "\n</div>"]))
        if command.epilog:
            parts.append(examples(command.epilog))
    return "\n\n".join(parts) + "\n"


def code(names: str) -> str:
    """Names of an option and what it takes, so that lines break between names."""
    return "<br>".join(f"<code>{cell(html.escape(name)).replace('[', '&#91;')}</code>" for name in names.split(", "))


def cell(text: str) -> str:
    return text.replace("|", "&#124;")


def markdown(text: str) -> str:
    """Help as Markdown: rich's marks for bold, lines of a paragraph joined; all else is shown as it is."""
    text = re.sub(r"\[/?bold\]", "**", re.sub(r"(?<!\n)\n(?!\n)", " ", text)).replace("  [", " [")
    return re.sub(
        r"_|(?<!\*)\*(?!\*)", lambda mark: f"\\{mark[0]}", html.escape(text, quote=False).replace("[", "&#91;")
    )


def examples(epilog: str) -> str:
    """What stands below a command's options: its examples as a block, the rest as text."""
    lines = [line for line in epilog.split("\n\n") if line]
    shown = [line for line in lines if line.startswith("moeopt ")]
    rest = [markdown(line) for line in lines if line not in shown and "Examples" not in line]
    return "\n\n".join(["```console\n" + "\n".join(shown) + "\n```"] * bool(shown) + rest)
