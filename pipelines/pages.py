"""How pages and tables are written: Jinja templates that share one style, and the same tables in Markdown."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines.tables import Cell, Table
from recsys.files import whole_file

TEMPLATES = Path(__file__).parent / "templates"


def render(template: str, **values: Any) -> str:
    """Return a template of `templates/` filled in; whatever comes from data is escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup, escape

    def code(text: str) -> Markup:
        """Set what stands between backticks as code; everything is escaped first."""
        parts = str(escape(text)).split("`")
        return Markup("".join(f"<code>{part}</code>" if index % 2 else part for index, part in enumerate(parts)))

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["code"] = code
    environment.filters["svg"] = Markup  # our own drawing, not input
    return environment.get_template(template).render(**values)


def write(directory: Path, texts: Mapping[str, str]) -> None:
    """Write files into a directory, which is made if it is not there; each is written whole or not at all."""
    for name, text in texts.items():
        with whole_file(directory / name) as temporary:
            temporary.write_text(text, encoding="utf-8")


def markdown(table: Table) -> str:
    """Return a table in Markdown, the best of a column bold."""

    def text(cell: Cell) -> str:
        value = f"**{cell.text}**" if cell.best else cell.text
        return f"{value} ({cell.below})" if cell.below else value

    lines = ["| " + " | ".join(table.header) + " |", "|---|" + "---:|" * (len(table.header) - 1)]
    lines += ["| " + " | ".join(text(cell).replace("|", "\\|") for cell in row) + " |" for row in table.rows]
    return "\n".join(lines)
