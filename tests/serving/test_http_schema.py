"""The server against its own OpenAPI: what the schema allows and what it forbids, by Schemathesis."""

from __future__ import annotations

import json

import hypothesis
import pytest
import schemathesis
from schemathesis.specs.openapi.checks import positive_data_acceptance

from eqr_kernels.serving.http.schema import Defaults, Limits
from tests.support.http_server import SOLUTION, serving
from tests.support.serving import PATIENCE


@pytest.fixture(scope="module")
def served():
    with serving(
        limits=Limits(puzzles=3, depth=8, breadth=2, steps=16), defaults=Defaults(depth=8), example=SOLUTION
    ) as it:
        yield it


def test_the_schema_has_the_bounds_and_examples_of_this_server(served):
    schema = served.client.get("/openapi.json").json()
    request = schema["components"]["schemas"]["SolveRequest"]
    fields = request["properties"]
    assert request["required"] == ["puzzles"] and request["additionalProperties"] is False
    assert fields["puzzles"]["maxItems"] == 3 and fields["puzzles"]["minItems"] == 1
    assert (fields["depth"]["minimum"], fields["depth"]["maximum"], fields["depth"]["default"]) == (1, 8, 8)
    assert fields["seed"]["maximum"] == (1 << 32) - 1
    assert fields["select"]["enum"] == ["residual", "vote", "q", "first"]
    for example in request["examples"]:
        assert served.client.post("/v1/solve", json=example).status_code == 200
    assert all(field.get("description") for field in fields.values())
    assert set(schema["paths"]) == {"/healthz", "/metrics", "/v1/model", "/v1/solve"}
    solve = schema["paths"]["/v1/solve"]["post"]["responses"]
    assert set(solve) == {"200", "400", "408", "413", "415", "429", "500", "503", "504"}
    assert "Retry-After" in solve["429"]["headers"]
    text = json.dumps(schema)
    assert "ValidationError" not in text and "422" not in text


@pytest.mark.parametrize("mode", ["POSITIVE", "NEGATIVE"])
def test_any_request_is_answered_as_the_schema_says(served, mode):
    schema = schemathesis.openapi.from_url(f"{served.url}/openapi.json")
    tried, answered = 0, set()

    def check(case):
        nonlocal tried
        tried += 1
        if mode == "POSITIVE" and tried % 2 and isinstance(case.body, dict):
            case.body = {**case.body, "puzzles": [SOLUTION, "?"], "ids": None, "deadline": 20}
        # A text that is allowed may still be no puzzle: 400 where it is alone.
        answered.add(case.call_and_validate(excluded_checks=[positive_data_acceptance], timeout=PATIENCE).status_code)

    for result in schema.get_all_operations():
        operation = result.ok()
        if mode == "POSITIVE" or operation.method == "post":
            settings = hypothesis.settings(
                max_examples=25 if operation.method == "post" else 3,
                derandomize=True,
                deadline=None,
                database=None,
                suppress_health_check=list(hypothesis.HealthCheck),
            )
            cases = operation.as_strategy(generation_mode=schemathesis.GenerationMode[mode])
            settings(hypothesis.given(cases)(check))()
    assert tried >= 25 and answered >= ({200, 400} if mode == "POSITIVE" else {400})
    assert served.client.get("/healthz").status_code == 200
