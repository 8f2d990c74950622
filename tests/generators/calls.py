"""Calls a service through the client that was generated: run by the test in the generator's own environment.

Arguments: the folder that the package `generated` is in, and the service's URL. Prints what came back as JSON.
"""

import json
import sys

sys.path.insert(0, sys.argv[1])

from generated import Client
from generated.api.layers import (
    backward,
    create_layer,
    eval_,
    fold_many_moments,
    fold_moments,
    get_layer,
    inverse,
    train,
    update_layer,
)
from generated.api.state import get_state, replace_state
from generated.models import (
    GradientInput,
    InputBatch,
    LayerConfig,
    LayerConfigStatistics,
    LayerState,
    LayerUpdate,
    ManyMoments,
    ManyMomentsLayers,
    MomentsDocument,
)

BATCH = [[1.0, 2.0], [3.0, 6.0]]


def main():
    # Accept is for GET state alone, whose default is safetensors; the other calls answer in the request's form.
    client = Client(sys.argv[2], headers={"Accept": "application/json"})
    told = {}

    def tell(name, answer):
        told[name] = answer.to_dict()
        return answer

    tell("created", create_layer.sync("bn", client=client, body=LayerConfig(num_features=2)))
    tell("trained", train.sync("bn", client=client, body=InputBatch(input_=BATCH), idempotency_key="once"))
    tell("evaluated", eval_.sync("bn", client=client, body=InputBatch(input_=BATCH)))
    tell("inverted", inverse.sync("bn", client=client, body=InputBatch(input_=told["evaluated"]["output"])))
    tell("gradients", backward.sync("bn", client=client, body=GradientInput(input_=BATCH, grad_output=BATCH)))
    moments = MomentsDocument(count=2, mean=[2.0, 4.0], var=[1.0, 4.0])
    tell("folded", fold_moments.sync("bn", client=client, body=moments))
    many = ManyMomentsLayers()
    many["bn"] = moments
    tell("folded_many", fold_many_moments.sync(client=client, body=ManyMoments(layers=many)))
    tell("state", get_state.sync("bn", client=client))
    tell("replaced", replace_state.sync("bn", client=client, body=LayerState(running_mean=[7.0, 8.0])))
    tell("updated", update_layer.sync("bn", client=client, body=LayerUpdate(eps=0.5)))
    population = LayerConfig(num_features=2, statistics=LayerConfigStatistics.POPULATION, momentum=None)
    tell("population", create_layer.sync("population", client=client, body=population))
    tell("nobody", get_layer.sync("nobody", client=client))
    print(json.dumps(told))


main()
