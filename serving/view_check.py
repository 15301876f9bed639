"""Reads a whole LMDB view of histories and ends with 1 if it is damaged; a process, for LMDB may crash on damage.

python -m serving.view_check DIRECTORY
"""

import os
import sys

import lmdb

RECORD_BYTES = 13


def check(directory: str) -> str:
    """Say what is wrong with a view, nothing if nothing is."""
    try:
        with lmdb.open(directory, readonly=True, max_dbs=3) as env:
            wanted = (env.info()["last_pgno"] + 1) * env.stat()["psize"]
            found = os.stat(os.path.join(directory, "data.mdb")).st_size  # noqa: PTH118, PTH116  no pathlib: start fast
            if found < wanted:
                return f"{found} bytes, expected {wanted}"
            for name in (b"meta", b"chunks", b"forgotten"):
                database = env.open_db(name, create=False)
                with env.begin(database) as txn:
                    for key, value in txn.cursor():
                        whole = value and len(value) % RECORD_BYTES == 0 and _user_bytes(key) == len(key) - 6
                        if name == b"chunks" and not whole:
                            return f"a chunk that is none, under the key {key!r}"
    except lmdb.Error as error:
        return str(error)
    return ""


def _user_bytes(key: bytes) -> int:
    return int.from_bytes(key[:2], "big")


if __name__ == "__main__":
    problem = check(sys.argv[1])
    if problem:
        sys.stderr.write(f"{problem}\n")
    sys.exit(1 if problem else 0)
