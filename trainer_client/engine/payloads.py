"""Who uses which payload: each content is stored once, and freed when nothing needs it any more."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from tasks.payloads import name_in_parts
from trainer_client.engine.encoding import Content
from trainer_client.engine.model import Payload, PayloadUser
from trainer_client.engine.states import PayloadStage


class PayloadLedger:
    """The payloads of a client.

    Args:
        new_name: Makes a name in the payload store that was never used before: freeing an old payload takes no new one
            of equal content away.
        part_bytes: What is larger lies in parts of at most so many bytes.
    """

    def __init__(self, new_name: Callable[[str], str], part_bytes: int) -> None:
        self._new_name, self._part_bytes = new_name, part_bytes
        self._by_digest: dict[str, Payload] = {}
        self._by_name: dict[str, Payload] = {}
        self._to_free: list[str] = []
        self._kept: dict[str, None] = {}
        """Names of foreign payloads that nothing here needs. Another ticket of that process may: content that several
        tickets have is stored once, and this process knows of the tickets alone that it has resumed."""

    def __len__(self) -> int:
        return len(self._by_name)

    def __iter__(self) -> Iterator[Payload]:
        return iter(self._by_name.values())

    def use(self, content: Content, user: PayloadUser) -> tuple[Payload, bool]:
        """The payload of this content, for `user`; and whether it is new, and has to be stored."""
        payload = self._by_digest.get(content.digest)
        is_new = payload is None
        if payload is None:
            name = name_in_parts(
                self._new_name(content.digest), content.num_bytes, self._part_bytes
            )
            payload = Payload(name, content.digest, PayloadStage.WAITING, content)
            self._by_digest[content.digest] = self._by_name[name] = payload
        self.share(payload, user)
        return payload, is_new

    def use_foreign(self, name: str, digest: str, user: PayloadUser) -> None:
        """Use a payload that an earlier process stored, for as long as `user` needs it."""
        self._kept.pop(name, None)
        payload = self._by_name.get(name)
        if payload is None:
            payload = self._by_name[name] = Payload(
                name, digest, PayloadStage.STORED, is_foreign=True
            )
        self.share(payload, user)

    @staticmethod
    def share(payload: Payload, user: PayloadUser) -> None:
        """`user` needs it too."""
        if user not in payload.users:
            payload.users[user] = None
            user.payloads.append(payload)

    def hand_over(self, giver: PayloadUser, taker: PayloadUser) -> None:
        """`taker` needs what `giver` did."""
        for payload in giver.payloads:
            self.share(payload, taker)
        self.release(giver)

    def release(self, user: PayloadUser) -> None:
        """`user` needs its payloads no more."""
        payloads, user.payloads = user.payloads, []
        for payload in payloads:
            del payload.users[user]
            if not payload.users and payload.stage is not PayloadStage.STORING:
                self._drop(payload)

    def content_of(self, name: str) -> Content:
        """The bytes of a payload that is not stored yet."""
        content: Content = self._by_name[name].content
        return content

    def stored(self, name: str) -> Payload | None:
        """A payload is in the store; None if nothing needs it any more, which frees it."""
        payload = self._by_name[name]
        payload.stage, payload.content = PayloadStage.STORED, None
        if payload.users:
            return payload
        self._drop(payload)
        return None

    def refused(self, name: str) -> list[PayloadUser]:
        """A payload cannot be stored; returns those that needed it, which have it no more."""
        payload = self._by_name[name]
        users = list(payload.users)
        for user in users:
            user.payloads.remove(payload)
        payload.users.clear()
        self._drop(payload)
        return users

    def names_in_use(self) -> list[str]:
        """Names of all that is in the store and needed."""
        return [
            payload.name
            for payload in self._by_name.values()
            if payload.stage is PayloadStage.STORED
        ]

    def free_later(self, names: Iterable[str]) -> None:
        """Requests that are not needed any more."""
        self._to_free.extend(names)

    def free_unused(self, names: Iterable[str]) -> None:
        """Free what is in the store, as others say, and what nothing here needs."""
        known = self._by_name.keys() | self._kept.keys()
        unused = [name for name in names if name not in known]
        self._to_free.extend(dict.fromkeys(unused))

    def keep_unused(self, names: Iterable[str]) -> None:
        """Foreign payloads are in the store, as others say; those that nothing here needs are kept."""
        for name in names:
            if name not in self._by_name:
                self._kept[name] = None

    def free_kept(self) -> None:
        """Free the foreign payloads that nothing here needs: this process ends, or needs their room."""
        self._to_free.extend(self._kept)
        self._kept.clear()

    def take_to_free(self) -> list[str]:
        """Names that nothing needs any more; the caller frees them."""
        names, self._to_free = self._to_free, []
        return names

    def _drop(self, payload: Payload) -> None:
        del self._by_name[payload.name]
        if self._by_digest.get(payload.digest) is payload:
            del self._by_digest[payload.digest]
        if payload.is_foreign:
            self._kept[payload.name] = None
        elif payload.stage is PayloadStage.STORED:
            self._to_free.append(payload.name)

    def check(self) -> None:
        """Every payload has users, or is on its way into the store; both sides know of each other."""
        assert self._kept.keys().isdisjoint(self._by_name)
        for name, payload in self._by_name.items():
            assert payload.name == name
            assert payload.users or payload.stage is PayloadStage.STORING, name
            has_content = payload.content is not None
            assert has_content == (payload.stage is not PayloadStage.STORED), name
            for user in payload.users:
                assert payload in user.payloads, name
