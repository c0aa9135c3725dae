"""HTTP on the engine: the API that OpenAI's clients speak. `partinf.serve.server.serve` runs it.

Small on purpose. Requests are read, checked and turned into those of the engine; one thread drives the engine, asyncio serves the
connections, and what the engine generates is handed over once per iteration. No jax is imported here: who loads the model is the caller.
"""
