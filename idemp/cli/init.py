"""``init``: makes what a store needs before its first use."""

from __future__ import annotations

import click

from idemp.cli.options import about
from idemp.stores import init_store


@click.command()
@click.argument("url")
@click.option("--grant", metavar="ROLE", default="", help="PostgreSQL: let this role use the tables.")
def init(url: str, grant: str) -> None:
    """Make the tables of the store at URL, or renew them for this version of idemp.

    A store makes them by itself at its first use if its user may; this is for a user who may not, and for
    a new version.
    """
    with about("URL"):
        click.echo(f"{init_store(url, grant)}.")
