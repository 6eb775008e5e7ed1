"""What an operator asks of the engines."""

from phi_cluster.cluster.errors import Unavailable


async def test_engines_are_renewed_on_request(client, engines):
    response = await client.post("/v1/engines/recycle")
    assert response.status_code == 202
    assert response.json() == {"object": "engines.recycling", "engines": 2}
    engines.answer = Unavailable("not now", retry_after=2)
    response = await client.post("/v1/engines/recycle")
    assert (response.status_code, response.headers["retry-after"]) == (503, "2")
