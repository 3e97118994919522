"""The OpenAI dialect over HTTP, against any engine of infer.request.Engine.

schema.py (what a body may say) -> prompts.py (text to ids) -> async_engine.py (one thread steps the engine) ->
choices.py (ids to text, logprobs) -> replies.py (whole, or as server-sent events). app.py has the routes, errors.py the
one form of every failure, metrics.py the figures for Prometheus. The command is infer/serve.py.
"""
