"""StateStore: ids, owners, ends and records of kept states. Pages are made by hand."""

from __future__ import annotations

import logging
from secrets import token_bytes

import msgspec
import pytest

from engine.errors import StateNotFound, StatesFull
from engine.state.cache import StateCache
from engine.state.page import DeleteRecord, DiskResult, Page, PageFile, WriteFile, WriteRecord
from engine.state.store import KeptState, StateRecord, StateStore
from engine.state.tiers import PageTiers
from engine.types import StateOptions

KEEP = StateOptions()


class Shop:
    """A store, the tiers behind it, and a clock to turn by hand."""

    def __init__(self, *, has_disk: bool = True, capacity: int = 8, num_frames: int = 16) -> None:
        self.now = 1000.0
        num_files = 100 if has_disk else 0
        self.tiers = PageTiers(16, num_frames, num_files, min_file_tokens=4)
        self.cache = StateCache(self.tiers, 4, b"seed")
        self.store = StateStore(
            self.cache,
            page_bytes=8,
            capacity=capacity,
            has_disk=has_disk,
            clock=lambda: self.now,
        )

    def page(self, num_tokens: int = 10) -> Page:
        """A page in a frame, held as the store wants it."""
        frame = self.tiers.take_frame()
        assert frame is not None
        file = PageFile(token_bytes(16), num_tokens, has_logits=True)
        return self.cache.add_page(file, frame)

    def put(self, owner: str = "ann", options: StateOptions = KEEP) -> KeptState:
        return self.store.put(owner, self.page(), options, None)

    def write_files(self, error: str | None = None) -> None:
        """The disk's worker does what it was asked for."""
        for job in self.tiers.files.take_jobs():
            self.tiers.finish_job(DiskResult(job, error))
            self.store.finish_job(DiskResult(job, error))

    def records(self) -> dict[str, bytes]:
        """What the jobs since the last call leave on the disk."""
        records = {}
        for job in self.store.take_jobs():
            if isinstance(job, WriteRecord):
                records[job.name] = job.data
            elif isinstance(job, DeleteRecord):
                records.pop(job.name, None)
        return records

    def ids(self, owner: str = "ann") -> list[str]:
        return [state.state_id for state in self.store.owned_by(owner)]

    def check(self) -> None:
        self.cache.check([])
        for page in self.cache.index:
            held = sum(state.page is page for state in self.store._states.values())
            assert page.num_holders == held


def test_ids_are_long_random_and_never_the_same() -> None:
    shop = Shop(num_frames=2)
    page = shop.page()
    ids = set()
    for _ in range(1000):
        shop.tiers.hold(page)
        ids.add(shop.store.put("ann", page, KEEP, None).state_id)
    assert len(ids) == 1000
    assert all(len(state_id.removeprefix("state-")) >= 22 for state_id in ids), "128 bits"
    for place in range(len("state-"), len("state-") + 20):
        assert len({state_id[place] for state_id in ids}) > 40, "a place of the id is not random"


def test_another_owners_id_is_not_found_in_the_same_words_as_an_unknown_one() -> None:
    shop = Shop()
    state = shop.put("ann")
    shop.now += 5
    gone = shop.put("bob", StateOptions(ttl_s=1))
    shop.now += 2
    messages = set()
    for owner, state_id in (
        ("bob", state.state_id), ("", state.state_id), ("bob", gone.state_id), ("ann", "state-x"),
    ):  # fmt: skip
        for verb in (shop.store.find, shop.store.delete, shop.store.update):
            with pytest.raises(StateNotFound) as refused:
                verb(owner, state_id)
            assert refused.value.field == "state"
            messages.add(str(refused.value).replace(state_id, "ID"))
        with pytest.raises(StateNotFound):
            shop.store.fork(owner, state_id, KEEP)
    assert len(messages) == 1
    assert shop.store.find("ann", state.state_id) is state


def test_a_list_has_the_newest_first_and_the_owners_own_only() -> None:
    shop = Shop()
    first, second = shop.put("ann"), shop.put("ann")
    shop.put("bob")
    fork = shop.store.fork("ann", first.state_id, KEEP)
    assert shop.ids("ann") == [fork.state_id, second.state_id, first.state_id]
    assert shop.ids("carl") == []


def test_a_fork_has_an_id_of_its_own_and_no_page_of_its_own() -> None:
    shop = Shop(capacity=1)
    parent = shop.put(options=StateOptions(label="parent", ttl_s=5, is_pinned=True))
    used = shop.tiers.num_frames_used
    fork = shop.store.fork("ann", parent.state_id, StateOptions(label="fork"))
    assert (fork.parent_id, fork.label, fork.is_pinned) == (parent.state_id, "fork", False)
    assert fork.expires_unix_s is None
    assert fork.page is parent.page
    assert shop.tiers.num_frames_used == used
    shop.store.delete("ann", parent.state_id)
    assert shop.store.find("ann", fork.state_id).page.exists
    shop.check()
    shop.store.delete("ann", fork.state_id)
    assert not fork.page.exists
    shop.write_files()  # what was under way holds the frame until then
    assert shop.tiers.num_frames_used == 0
    shop.check()


def test_a_deleted_state_leaves_its_page_to_nobody() -> None:
    shop = Shop()
    state = shop.put()
    shop.write_files()
    page = state.page
    assert page.has_file
    shop.store.delete("ann", state.state_id)
    assert shop.cache.index.get(page.digest) is None
    assert not page.exists
    with pytest.raises(StateNotFound):
        shop.store.find("ann", state.state_id)


def test_a_state_ends_when_its_time_is_over_unless_it_is_pinned() -> None:
    shop = Shop()
    mortal = shop.put(options=StateOptions(ttl_s=10))
    pinned = shop.put(options=StateOptions(ttl_s=10, is_pinned=True))
    endless = shop.put()
    assert shop.store.info(mortal).expires_unix_s == 1010
    assert shop.store.info(pinned).expires_unix_s is None
    shop.now += 9.9
    assert len(shop.ids()) == 3
    shop.now += 0.1
    assert shop.ids() == [endless.state_id, pinned.state_id]
    assert not mortal.page.exists
    shop.store.update("ann", pinned.state_id, is_pinned=False)
    assert shop.ids() == [endless.state_id]
    shop.check()


def test_find_alone_sees_that_a_state_has_expired() -> None:
    shop = Shop()
    state = shop.put(options=StateOptions(ttl_s=10))
    shop.now += 10
    with pytest.raises(StateNotFound):
        shop.store.find("ann", state.state_id)
    assert len(shop.store) == 0
    shop.check()


def test_an_update_changes_what_is_given_and_nothing_else() -> None:
    shop = Shop()
    state = shop.put(options=StateOptions(label="old", ttl_s=10))
    shop.now += 5
    found = shop.store.info(shop.store.update("ann", state.state_id, label="new"))
    assert (found.label, found.expires_unix_s, found.is_pinned) == ("new", 1010, False)
    found = shop.store.info(shop.store.update("ann", state.state_id, ttl_s=10))
    assert (found.label, found.expires_unix_s) == ("new", 1015)
    found = shop.store.info(shop.store.update("ann", state.state_id, ttl_s=float("inf")))
    assert found.expires_unix_s is None
    assert found.created_unix_s == 1000


def test_the_capacity_counts_pages_and_those_that_are_coming() -> None:
    shop = Shop(capacity=3)
    state = shop.put()
    for _ in range(5):
        shop.store.fork("ann", state.state_id, KEEP)
    shop.store.check_room(1)
    with pytest.raises(StatesFull, match=r"1 states are kept and 2 on their way, of 3.*disk_state"):
        shop.store.check_room(2)
    shop.put(options=StateOptions(ttl_s=1))
    with pytest.raises(StatesFull):
        shop.store.check_room(1)
    shop.now += 1
    shop.store.check_room(1)


def test_without_a_disk_the_remedy_is_host_memory() -> None:
    shop = Shop(capacity=1, has_disk=False)
    shop.put()
    with pytest.raises(StatesFull, match="host_state_mib"):
        shop.store.check_room(0)


def test_host_memory_that_is_full_of_what_must_stay_is_refused() -> None:
    shop = Shop(capacity=100, num_frames=3, has_disk=False)
    shop.put()
    shop.store.check_room(0)
    with pytest.raises(StatesFull, match="host memory"):
        shop.store.check_room(1)
    shop.put()
    with pytest.raises(StatesFull, match="host memory"):
        shop.store.check_room(0)


def test_a_record_is_written_after_the_file_of_its_page_and_not_before() -> None:
    shop = Shop()
    state = shop.put()
    assert [type(job) for job in shop.tiers.files._jobs] == [WriteFile]
    assert shop.store.take_jobs() == []
    shop.store.update("ann", state.state_id, label="still none")
    assert shop.store.take_jobs() == []
    shop.write_files(error="disk full")
    assert shop.store.take_jobs() == []
    assert not state.has_record
    shop.tiers.keep_safe(state.page)
    shop.write_files()
    assert list(shop.records()) == [state.state_id]
    assert shop.store.is_saved
    fork = shop.store.fork("ann", state.state_id, KEEP)
    assert list(shop.records()) == [fork.state_id]


def test_a_record_that_could_not_be_written_is_written_with_the_next_page() -> None:
    shop = Shop()
    state = shop.put()
    shop.write_files()
    [job] = shop.store.take_jobs()
    shop.store.finish_job(DiskResult(job, "disk full"))
    assert not shop.store.is_saved
    other = shop.put()
    shop.write_files()
    assert set(shop.records()) == {state.state_id, other.state_id}
    assert shop.store.is_saved


def test_a_change_is_recorded_and_a_deletion_removes_the_record() -> None:
    shop = Shop()
    state = shop.put()
    shop.write_files()
    shop.store.take_jobs()
    shop.store.update("ann", state.state_id, label="new", is_pinned=True)
    [data] = shop.records().values()
    record = msgspec.json.decode(data, type=StateRecord)
    assert (record.label, record.is_pinned, record.owner) == ("new", True, "ann")
    shop.store.delete("ann", state.state_id)
    assert shop.store.take_jobs() == [DeleteRecord(state.state_id)]


def test_without_a_disk_nothing_is_recorded() -> None:
    shop = Shop(has_disk=False)
    state = shop.put()
    shop.store.delete("ann", state.state_id)
    assert shop.store.take_jobs() == []
    assert shop.store.is_saved


def restored(shop: Shop, records: dict[str, bytes]) -> Shop:
    """Another process over the same files."""
    files = [
        PageFile(page.digest, page.num_tokens, page.has_logits)
        for page in shop.cache.index
        if page.has_file
    ]
    other = Shop()
    other.now = shop.now
    other.cache.adopt_files(files)
    other.store.restore(records)
    return other


def test_states_are_the_same_after_a_restart() -> None:
    shop = Shop()
    options = StateOptions(label="café", ttl_s=100, is_pinned=True)
    states = [shop.put("ann", options), shop.put("bob"), shop.put("ann", StateOptions(ttl_s=7))]
    shop.write_files()
    fork = shop.store.fork("ann", states[0].state_id, KEEP)
    records = shop.records()
    shop.now += 10
    other = restored(shop, records)
    assert sorted(other.ids("ann")) == sorted([fork.state_id, states[0].state_id])
    for state in (states[0], states[1], fork):
        found = other.store.info(other.store.find(state.owner, state.state_id))
        before = shop.store.info(state)
        assert found.tier == "disk"
        assert [getattr(found, name) for name in UNCHANGED] == [
            getattr(before, name) for name in UNCHANGED
        ]
    assert other.store.take_jobs() == [DeleteRecord(states[2].state_id)], "it has expired"
    other.check()
    other.store.restore(records)
    other.check()
    assert len(other.store) == 3


UNCHANGED = (
    "state_id", "num_tokens", "num_bytes", "created_unix_s", "expires_unix_s", "label", "is_pinned",
    "has_logits", "parent_id",
)  # fmt: skip


GOOD = {
    "format": 1, "owner": "ann", "digest": "AAAAAAAAAAAAAAAAAAAAAA==", "created_unix_s": 1,
    "expires_unix_s": None, "label": "", "is_pinned": False, "parent_id": None,
}  # fmt: skip


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff\xfe\x00",
        b"null",
        b"[]",
        b"{}",
        b'"' * 3,
        msgspec.json.encode(GOOD)[:-5],
        msgspec.json.encode(GOOD),  # of a page that is not there
        msgspec.json.encode(GOOD | {"owner": 7}),
        msgspec.json.encode(GOOD | {"digest": "no base64!"}),
        msgspec.json.encode(GOOD | {"expires_unix_s": "soon"}),
        b'{"format": 1, "x": ' + b"[" * 100_000,
        b'{"format": 1, "owner": "\xff"}',
    ],
)
def test_a_broken_record_is_given_up_with_one_line(
    data: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    shop = Shop()
    state = shop.put()
    shop.write_files()
    with caplog.at_level(logging.INFO):
        other = restored(shop, {"state-broken": data, **shop.records()})
    assert other.ids() == [state.state_id]
    assert len(caplog.records) == 1
    assert "state-broken" in caplog.text
    assert other.store.take_jobs() == [DeleteRecord("state-broken")]
    other.check()


def test_records_of_others_are_left_alone() -> None:
    shop = Shop()
    shop.store.restore({"gen-abc": b"whatever"})
    assert shop.store.take_jobs() == []


def test_a_record_of_a_format_to_come_is_not_used(caplog: pytest.LogCaptureFixture) -> None:
    shop = Shop()
    shop.put()
    shop.write_files()
    records = {
        name: msgspec.json.encode(msgspec.json.decode(data) | {"format": 2})
        for name, data in shop.records().items()
    }
    other = restored(shop, records)
    assert other.ids() == []
    assert len(caplog.records) == 1
    other.check()


def test_a_state_whose_file_could_not_be_read_back_is_gone() -> None:
    shop = Shop()
    state = shop.put()
    shop.write_files()
    other = restored(shop, shop.records())
    page = other.store.find("ann", state.state_id).page
    assert other.tiers.fetch(page)
    other.write_files(error="checksum")
    assert other.ids() == []
    other.check()
