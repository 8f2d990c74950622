"""What `/metrics` says, read by Prometheus's own parser."""

from prometheus_client.parser import text_string_to_metric_families


def read(text):
    """{(name, labels as a frozenset of pairs): value}; a series that is there twice fails."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            key = sample.name, frozenset(sample.labels.items())
            assert key not in found, key
            found[key] = sample.value
    return found


def total(found, name, **labels):
    """The sum of the series of this name that have these labels."""
    return sum(
        value for (each, pairs), value in found.items() if each == name and labels.items() <= dict(pairs).items()
    )


def by(found, name, *labels):
    """The values of the series of this name, by these of their labels."""
    return {
        tuple(dict(pairs)[label] for label in labels): value for (each, pairs), value in found.items() if each == name
    }


async def metrics(client):
    """What a service says now."""
    answer = await client.get("/metrics")
    assert answer.status_code == 200
    return read(answer.text)
