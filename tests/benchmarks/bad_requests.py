"""Bad requests tried and defects found: every operation of the OpenAPI document, by schemathesis.

    python tests/benchmarks/bad_requests.py --examples 400 --out bad_requests.json

In process, over a small bundle. Half of the requests keep to the schema, half break it. A defect (a 5xx other than
501, or 503 with Retry-After) stops it with the smallest request that shows it.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from fuzzing import try_requests
from serving_world import make_service, publish_world
from starlette.testclient import TestClient

from serving.app import create_app


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=400, help="requests per operation, about")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as directory:
        service = make_service(publish_world(Path(directory) / "world"), Path(directory) / "state")
        with TestClient(create_app(service), raise_server_exceptions=False) as client:
            found = try_requests(client, arguments.examples)
        service.close()
    for operation in sorted({name for name, _ in found}):
        statuses = {status: count for (name, status), count in sorted(found.items()) if name == operation}
        print(f"{operation:<40} {statuses}")
    total = sum(found.values())
    refused = sum(count for (_, status), count in found.items() if 400 <= status < 500)
    print(f"{total} requests, {refused} of them refused as bad, no defect, {time.perf_counter() - began:.0f} s")
    if arguments.out:
        table = {"requests": total, "refused": refused, "defects": 0, "seconds": time.perf_counter() - began}
        arguments.out.write_text(json.dumps(table, indent=2) + "\n")


if __name__ == "__main__":
    main()
