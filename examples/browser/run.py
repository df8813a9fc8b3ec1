"""Sends the chain, its steps to two workers in turn, and prints what the last of them read in the browser."""

import sys

from celery import chain

from examples.browser.tasks import fill_in, open_page, read_page

WAIT_SECONDS = 60


def main() -> int:
    workflow = chain(
        open_page.s("Soup").set(queue="a"),
        fill_in.s("Ada").set(queue="b"),
        read_page.s().set(queue="a"),
    )
    result = workflow().get(timeout=WAIT_SECONDS)
    for row in result["rows"]:
        print("{task:<9}  {worker}  session {session} {how}, requests: {requests}".format_map(row))
    print(result["text"])
    return 0 if result["text"] == "Soup for Ada" else 1


if __name__ == "__main__":
    sys.exit(main())
