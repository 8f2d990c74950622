"""The same for binary bodies: takes a layer's state as safetensors, and gives it to another layer."""

import sys
from io import BytesIO

sys.path.insert(0, sys.argv[1])

from generated import Client
from generated.api.layers import create_layer
from generated.api.state import get_state, replace_state
from generated.models import LayerConfig, LayerState
from generated.types import File

client = Client(sys.argv[2])
for name in ("bn", "copy"):
    create_layer.sync(name, client=client, body=LayerConfig(num_features=2))
replace_state.sync("bn", client=client, body=LayerState(running_mean=[7.0, 8.0]))
taken = get_state.sync("bn", client=client).payload.read()
replaced = replace_state.sync("copy", client=client, body=File(BytesIO(taken)))
assert replaced.running_mean == [7.0, 8.0], replaced
