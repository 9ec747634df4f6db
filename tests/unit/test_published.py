"""Weights as files: what is published is read to the bit, and what is not whole is refused."""

from __future__ import annotations

import errno
import secrets

import fsspec
import pytest
import torch

from qerl_sync import ConfigError, PublishedSource, Publisher, Source
from qerl_sync.errors import CoverageError, PublicationError, PublisherTakenError
from qerl_sync.meta import ParamMeta
from qerl_sync.published import publisher as publisher_module
from qerl_sync.published.files import Manifest, Store


class Weights(Source):
    def __init__(self):
        torch.manual_seed(0)
        self.tensors = {
            "a": torch.randn(300, 70).bfloat16(),
            "b": torch.randn(11),
            "frozen": torch.randn(40, 40),
        }

    def metadata(self):
        return [
            ParamMeta(n, str(t.dtype).removeprefix("torch."), tuple(t.shape))
            for n, t in self.tensors.items()
        ]

    def materialize(self, names):
        for name in names:
            yield name, self.tensors[name]

    def step(self):
        for name in ("a", "b"):
            tensor = self.tensors[name] = self.tensors[name].clone()
            tensor[torch.rand(tensor.shape) < 0.02] *= -1
            tensor.view(-1)[-1] += 1

    def copy(self):
        return dict(self.tensors)


def held(source):
    return dict(source.materialize([meta.name for meta in source.metadata()]))


def same(found, expected):
    return found.keys() == expected.keys() and all(
        torch.equal(found[name].view(torch.uint8), expected[name].view(torch.uint8))
        for name in expected
    )


@pytest.fixture(params=["directory", "object store"])
def url(request, tmp_path):
    if request.param == "directory":
        return str(tmp_path / "run")
    return f"memory://{secrets.token_hex(8)}"


def files(url, part):
    store = Store(url)
    return [store._path(name) for name in sorted(store.listing()) if part in name]


def change(url, path, how):
    fs, _ = fsspec.core.url_to_fs(url)
    fs.pipe_file(path, how(fs.cat_file(path)))


def remove(url, path):
    fsspec.core.url_to_fs(url)[0].rm_file(path)


def published(url, count, **options):
    """Publish so many versions. Return the publisher, the weights, and those of each version."""
    weights, made = Weights(), {}
    publisher = Publisher(url, **options)
    for _ in range(count):
        publisher.publish(weights, step=10 * (publisher.version + 1))
        made[publisher.version] = weights.copy()
        weights.step()
    return publisher, weights, made


def test_each_version_is_read_as_it_was_published(url):
    weights, reader = Weights(), PublishedSource(url)
    assert not reader.refresh()
    publisher = Publisher(url, snapshot_every=3)
    kinds = []
    for step in range(1, 8):
        found = publisher.publish(weights, step=step)
        kinds.append(found.is_full)
        assert found.is_full or found.nbytes < 4000
        assert reader.refresh()
        assert not reader.refresh()
        assert (reader.version, reader.step) == (found.version, step)
        assert same(held(reader), weights.copy())
        late = PublishedSource(url)
        assert late.refresh()
        assert same(held(late), weights.copy())
        weights.step()
    assert kinds == [True, False, False, True, False, False, True]


def test_a_reader_catches_up_over_several_versions(url):
    publisher, weights, _ = published(url, 1)
    reader = PublishedSource(url)
    reader.refresh()
    stamps = dict(reader.content_stamps())
    for _ in range(3):
        weights.step()
        publisher.publish(weights)
    assert reader.refresh()
    assert reader.version == 4
    assert same(held(reader), weights.copy())
    changed = {n for n, stamp in reader.content_stamps().items() if stamps[n] != stamp}
    assert changed == {"a", "b"}


@pytest.mark.parametrize(
    "break_it",
    [
        lambda url: remove(url, files(url, "v0000000005-")[1]),  # its manifest: a gap
        lambda url: remove(url, files(url, "v0000000005-")[0]),
        lambda url: change(url, files(url, "v0000000005-")[0], lambda data: data[:-100]),
        lambda url: change(url, files(url, "v0000000005-")[0], lambda data: data[:-1] + b"\0\0"),
        lambda url: change(url, files(url, "v0000000005-")[1], lambda data: data[:200]),
        lambda url: change(
            url, files(url, "v0000000005-")[1], lambda data: data.replace(b'"step"', b'"sTep"')
        ),
        lambda url: change(url, files(url, "v0000000005-")[1], lambda data: b""),
    ],
    ids=["gap", "no file", "torn file", "wrong byte", "torn manifest", "changed manifest", "empty"],
)
def test_what_is_not_whole_is_refused_and_the_last_whole_one_taken(url, break_it):
    _, _, made = published(url, 2, snapshot_every=3)
    reader = PublishedSource(url)
    assert reader.refresh()
    other = PublishedSource(url)
    publisher, weights, more = published_more(url)
    assert publisher.version == 6
    break_it(url)
    for one in (reader, other):
        assert one.refresh()
        assert one.version == 4, "5 and what builds on it are not whole"
        assert any("v0000000006" in name for name in one.refused)
        assert same(held(one), more[4])
        assert not one.refresh()
    for _ in range(3):
        weights.step()
        publisher.publish(weights)
    assert reader.refresh(), "the next snapshot heals it"
    assert reader.version >= 7
    assert same(held(reader), weights.copy())
    assert made


def published_more(url):
    """A second run in the directory: versions 3 (all tensors) to 6, of which 4 has all tensors."""
    weights, made = Weights(), {}
    publisher = Publisher(url, snapshot_every=1)
    publisher.publish(weights)
    weights.step()
    publisher.publish(weights)
    made[publisher.version] = weights.copy()
    publisher._snapshot_every = 4
    for _ in range(2):
        weights.step()
        publisher.publish(weights)
        made[publisher.version] = weights.copy()
    return publisher, weights, made


def test_where_nothing_is_whole_a_reader_says_so_and_yields_nothing(url):
    published(url, 2)
    change(url, files(url, "full-00000")[0], lambda data: data[:50])
    reader = PublishedSource(url)
    with pytest.raises(PublicationError) as caught:
        reader.refresh()
    assert caught.value.path == url
    with pytest.raises(PublicationError):
        reader.metadata()


def test_values_that_are_not_the_publishers_are_refused_after_the_fact(url, monkeypatch):
    publisher, weights, made = published(url, 1)
    reader = PublishedSource(url)
    reader.refresh()
    real = publisher_module.checksum
    monkeypatch.setattr(publisher_module, "checksum", lambda tensor: real(tensor) ^ 1)
    publisher.publish(weights)
    assert reader.refresh(), "what it held is a mix: it begins again with all tensors"
    assert reader.version == 1
    assert reader.refused
    assert same(held(reader), made[1])


def test_two_publishers_do_not_mix_their_versions(url):
    first, weights, _ = published(url, 2)
    second = Publisher(url)
    assert second.publish(weights).is_full
    mark = weights.copy()
    weights.step()
    with pytest.raises(PublisherTakenError) as caught:
        first.publish(weights)
    assert caught.value.version == 3
    reader = PublishedSource(url)
    assert reader.refresh()
    assert reader.version == 3
    assert same(held(reader), mark)
    assert not second.publish(weights).is_full


@pytest.mark.parametrize("part", ["changes-00000", "manifest"])
def test_a_full_disk_leaves_the_version_before_and_the_next_has_all_tensors(url, monkeypatch, part):
    publisher, weights, made = published(url, 2)
    fs = type(fsspec.core.url_to_fs(url)[0])
    real = fs.pipe_file

    def full(self, path, data, **options):
        if part in path:
            real(self, path, data[: len(data) // 2], **options)
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(self, path, data, **options)

    reader = PublishedSource(url)
    with monkeypatch.context() as patch:
        patch.setattr(fs, "pipe_file", full)
        with pytest.raises(PublicationError) as caught:
            publisher.publish(weights)
    assert part in caught.value.path
    assert reader.refresh()
    assert reader.version == publisher.version == 2
    assert same(held(reader), made[2])
    found = publisher.publish(weights)
    assert found.is_full
    assert found.version == 4, "the number of the failed attempt is spent"
    assert reader.refresh()
    assert same(held(reader), weights.copy())


def test_a_full_disk_of_the_reader_has_a_name(url, monkeypatch, tmp_path):
    published(url, 1)
    reader = PublishedSource(url, directory=str(tmp_path))

    class Full:
        def __init__(self, *args, **options): ...
        def __enter__(self):
            return self

        def __exit__(self, *exc): ...
        def write(self, data):
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.open", Full)
        with pytest.raises(PublicationError, match="No space left"):
            reader.refresh()
    assert reader.refresh()


def test_files_without_a_manifest_are_nothing(url):
    publisher, weights, _ = published(url, 1)
    reader = PublishedSource(url)
    reader.refresh()
    publisher.publish(weights)
    remove(url, files(url, "changes.manifest")[0])
    assert not reader.refresh()
    assert reader.version == 1


def test_old_snapshots_go_and_a_reader_that_comes_late_takes_the_newest(url):
    weights, reader = Weights(), PublishedSource(url)
    publisher = Publisher(url, snapshot_every=2, keep_snapshots=2)
    publisher.publish(weights)
    reader.refresh()
    for _ in range(7):
        weights.step()
        publisher.publish(weights)
    assert {one.version for one in Store(url).published()} == {5, 6, 7, 8}
    assert len(Store(url).listing()) == 8
    assert reader.refresh()
    assert same(held(reader), weights.copy())


def test_what_cannot_be_published_is_refused(url):
    publisher, weights, made = published(url, 1)
    weights.tensors["b"] = torch.full((11,), torch.nan)
    with pytest.raises(CoverageError):
        publisher.publish(weights)
    reader = PublishedSource(url)
    reader.refresh()
    assert same(held(reader), made[1])

    class Adapted(Weights):
        collective = True

    with pytest.raises(ConfigError):
        publisher.publish(Adapted())
    with pytest.raises(ConfigError):
        Publisher(url, snapshot_every=0)
    with pytest.raises(ConfigError):
        Publisher("nowhere://bucket/run")


def test_a_manifest_names_files_of_its_own_directory_alone(url):
    publisher, *_ = published(url, 1)
    good, _ = Store(url).read_manifest(publisher._base.name)
    for name in ("../secret", "/etc/passwd", "v0000000001-x.safetensors"):
        bad = good.model_copy(update={"files": [good.files[0].model_copy(update={"name": name})]})
        with pytest.raises(ValueError, match="name"):
            Manifest.decode(bad.encode()[0], good.name)


def test_tensors_that_change_their_shape_begin_anew(url):
    publisher, weights, _ = published(url, 1)
    weights.tensors["b"] = torch.randn(12)
    reader = PublishedSource(url)
    reader.refresh()
    assert publisher.publish(weights).is_full
    assert reader.refresh()
    assert same(held(reader), weights.copy())


def test_a_directory_that_another_run_has_begun_anew_is_not_taken_for_an_old_one(url):
    published(url, 3)
    reader = PublishedSource(url)
    reader.refresh()
    for path in files(url, "v"):
        remove(url, path)
    assert not reader.refresh(), "nothing is there"
    published(url, 1)
    with pytest.raises(PublicationError) as caught:
        reader.refresh()
    assert (caught.value.path, caught.value.version) == (url, 1)
    other = PublishedSource(url)
    assert other.refresh()
