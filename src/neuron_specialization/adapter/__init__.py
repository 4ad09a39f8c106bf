"""The PEFT method: masks injected into the FFNs of a model, and what can be trained under them."""
