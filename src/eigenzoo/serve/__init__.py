"""Serve many models of a subspace from one base model, mixed in one batch: y = W x + U(C(Vᵀ x)).

served = eigenzoo.serve.attach(model, space)                   # any torch module
served.generate(**inputs, models=["a", "b", eigenzoo.serve.BASE])
with served.route(["a", "b"]): model(**batch)
served.detach()
"""

from eigenzoo.serve.attach import attach
from eigenzoo.serve.route import BASE
from eigenzoo.serve.served import Served

__all__ = ["BASE", "Served", "attach"]
