"""A service whose disk is full: 503, nothing acknowledged is lost, and it goes on once there is room."""

import contextlib
import signal
import subprocess

import pytest

BATCH = {"input": [[1.0, 2.0], [3.0, 5.0]]}
MEBIBYTE = 1 << 20


@pytest.fixture
def small_disk(tmp_path):
    """A directory on a file system of its own, of 8 MiB."""
    directory = tmp_path / "disk"
    directory.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(directory)]
    try:
        done = subprocess.run(command, capture_output=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount here")
    if done.returncode:
        pytest.skip("only root may mount a file system")
    yield directory
    subprocess.run(["umount", "--lazy", str(directory)], check=True)


def fill(directory):
    """Take all room there is."""
    filler = directory / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    return filler


def train(http, url, key):
    return http.post(f"{url}/v1/layers/bn/train", json=BATCH, headers={"Idempotency-Key": key})


def kept(http, url):
    """Pins and history, and the state of the pin."""
    calls = ("pins", "history?limit=100", "state?at=early")
    return [http.get(f"{url}/v1/layers/bn/{call}").raise_for_status().content for call in calls]


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_full_disk_refuses_batches_and_loses_none(start, http, small_disk, workers):
    store = f"sqlite:///{small_disk}/layers.db"
    variables = {"BATCHNORM_STORE_TIMEOUT_SECONDS": "0.2"}
    service = start("--store", store, "--workers", workers, **variables)
    url = service.url
    http.put(f"{url}/v1/layers/bn", json={"num_features": 2}).raise_for_status()
    for number in range(10):
        assert train(http, url, f"before-{number}").status_code == 200
    assert http.put(f"{url}/v1/layers/bn/pins/early", json={}).status_code == 201
    pins, _, state = kept(http, url)
    filler = fill(small_disk)
    statuses = [train(http, url, f"full-{number}").status_code for number in range(8)]
    assert set(statuses) <= {200, 503}, "the log has some room"
    assert statuses[-1] == 503
    refused = train(http, url, "refused")
    assert refused.status_code == 503
    assert refused.json()["type"] == "/problems/store-unavailable"
    assert "Retry-After" in refused.headers
    assert http.put(f"{url}/v1/layers/new", json={"num_features": 100_000}).status_code == 503
    layer = http.get(f"{url}/v1/layers/bn").json()
    assert layer["num_batches_tracked"] == 10 + statuses.count(200)
    assert http.post(f"{url}/v1/layers/bn/eval", json=BATCH).status_code == 200, "reads go on"
    assert http.put(f"{url}/v1/layers/bn/pins/late", json={}).status_code == 503
    assert http.post(f"{url}/v1/layers/bn/rollback", json={"tag": "early"}).status_code == 503
    assert kept(http, url)[::2] == [pins, state]
    filler.unlink()
    for number, status in enumerate(statuses):
        again = train(http, url, f"full-{number}")
        assert again.status_code == 200
        assert ("Idempotent-Replay" in again.headers) == (status == 200)
    assert train(http, url, "refused").json()["num_batches_tracked"] == 19
    expected, all_kept = http.get(f"{url}/v1/layers/bn").json(), kept(http, url)
    assert all_kept[::2] == [pins, state]
    service.stop(signal.SIGKILL if workers == "1" else signal.SIGTERM)
    url = start("--store", store, **variables).url
    assert http.get(f"{url}/v1/layers/bn").json() == expected
    assert kept(http, url) == all_kept
    assert http.get(f"{url}/v1/layers/new").status_code == 404


def test_a_service_that_is_killed_with_a_full_disk_starts_again(start, http, small_disk):
    store = f"sqlite:///{small_disk}/layers.db"
    variables = {"BATCHNORM_STORE_TIMEOUT_SECONDS": "0.2"}
    service = start("--store", store, **variables)
    http.put(f"{service.url}/v1/layers/bn", json={"num_features": 2}).raise_for_status()
    for number in range(10):
        assert train(http, service.url, f"before-{number}").status_code == 200
    filler = fill(small_disk)
    acknowledged = [train(http, service.url, f"full-{number}").status_code for number in range(8)].count(200)
    assert acknowledged < 8
    service.stop(signal.SIGKILL)
    filler.unlink()
    url = start("--store", store, **variables).url
    count = http.get(f"{url}/v1/layers/bn").json()["num_batches_tracked"]
    assert count == 10 + acknowledged
