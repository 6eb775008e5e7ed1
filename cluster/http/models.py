"""GET /v1/models, and which names a request may call the model by.

Owns: the served names. Knows nothing of checkpoints.
"""

from __future__ import annotations

from typing import Any, Literal

from fastapi import APIRouter
from pydantic import BaseModel

from phi_cluster.cluster.errors import NotFound
from phi_cluster.cluster.http.edge import Edge, EdgeSettings
from phi_cluster.cluster.http.openapi import error_docs


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "phi-cluster"
    # The name that responses carry, whichever alias was asked for.
    root: str
    max_model_len: int


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


def check_model(name: str | None, settings: EdgeSettings) -> None:
    """Raises `NotFound` unless `name` is a served one. None is whatever is served."""
    if name is not None and name not in settings.served_model_names:
        served = ", ".join(settings.served_model_names)
        raise NotFound(
            f"The model {name[:100]!r} does not exist here; served: {served}",
            param="model",
            code="model_not_found",
        )


def models_router(edge: Edge) -> APIRouter:
    """The endpoints, over `edge`."""
    router = APIRouter(tags=["models"])
    settings = edge.settings
    created = int(edge.clock.time())

    def card(name: str) -> ModelCard:
        root = settings.served_model_names[0]
        return ModelCard(id=name, created=created, root=root, max_model_len=settings.max_model_len)

    @router.get("/v1/models")
    async def list_models() -> ModelList:
        """All names of the model served here."""
        return ModelList(data=[card(name) for name in settings.served_model_names])

    # A path, because names of models contain slashes.
    documented: dict[int | str, dict[str, Any]] = error_docs(404)

    @router.get("/v1/models/{model:path}", responses=documented)
    async def get_model(model: str) -> ModelCard:
        """One of the names."""
        check_model(model, settings)
        return card(model)

    return router
