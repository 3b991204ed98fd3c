"""What schemathesis cannot know: a model's name. Without one, requests are for the only model that is served."""

import schemathesis


@schemathesis.hook
def map_body(context, body):
    if isinstance(body, dict):
        body.pop("model", None)
    return body
