"""Bad requests tried and defects found: every operation of the OpenAPI document, by schemathesis.

    python tests/benchmarks/bad_requests.py --examples 400 --out bad_requests.json      # about ten minutes

In process, over two small bundles: one that recommends, and one that recommends, searches and reranks. Half of the
requests keep to the schema, half break it. A defect (a 5xx other than 503 with Retry-After) stops it with the smallest
request that shows it.
"""

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from fuzzing import try_requests
from serving_world import patient_app, publish_world
from starlette.testclient import TestClient
from text_world import publish_whole

from serving.settings import ServeConfig, load_into, open_service


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=400, help="requests per operation and bundle, about")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    began, found = time.perf_counter(), Counter[tuple[str, int]]()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        place = publish_world(directory / "world")
        for bundle in (place.bundle, publish_whole(directory / "whole")):
            config = ServeConfig(bundle, place.snapshot, directory / f"state-{bundle.name}", durability="os")
            service = open_service(config)
            load_into(service, bundle)
            with TestClient(patient_app(service), raise_server_exceptions=False) as client:
                found += try_requests(client, arguments.examples)
            service.close()
    seconds = time.perf_counter() - began
    for operation in sorted({name for name, _ in found}):
        statuses = {status: count for (name, status), count in sorted(found.items()) if name == operation}
        print(f"{operation:<40} {statuses}")
    total = sum(found.values())
    by_class = Counter({"2xx": 0, "4xx": 0, "5xx": 0})
    for (_, status), count in found.items():
        by_class[f"{status // 100}xx"] += count
    print(f"{total} requests, {dict(sorted(by_class.items()))}, no defect; {seconds:.0f} s")
    if arguments.out:
        table = {"requests": total, **by_class, "defects": 0, "seconds": seconds}
        arguments.out.write_text(json.dumps(table, indent=2) + "\n")


if __name__ == "__main__":
    main()
