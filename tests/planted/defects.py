"""The table: defects that a tired hand might write, and the tests that must notice each.

Rules: one edit a defect; its `old` text stands in its file exactly once, or the defect is to be
mended with the code. Must not know: how it is planted.
"""

from __future__ import annotations

from typing import NamedTuple


class Defect(NamedTuple):
    """What is wrong in one sentence; `old` becomes `new` in the file `path`."""

    name: str
    path: str
    old: str
    new: str
    tests: tuple[str, ...]


MEMORY, POOL = "fastserve/core/memory/memory.py", "fastserve/core/memory/pool.py"
TABLES, PREFIX = "fastserve/core/memory/tables.py", "fastserve/core/memory/prefix.py"
RECLAIM, SWAP = "fastserve/core/memory/reclaim.py", "fastserve/core/memory/swap.py"
VICTIMS, RANKING = "fastserve/core/memory/victims.py", "fastserve/core/memory/ranking.py"
SCHEDULER, PACKING = "fastserve/core/scheduler.py", "fastserve/core/packing.py"
REQUEST, ACCOUNTS = "fastserve/core/request.py", "fastserve/core/accounts.py"
POLICIES, POLICY_TESTS = "fastserve/core/policies", "tests/core/policies"
DISPATCH, STREAMS = "fastserve/client/dispatch.py", "fastserve/client/streams.py"
ENGINE, PROCESS = "fastserve/engine/engine.py", "fastserve/engine/process.py"

RANDOM_RUNS = "tests/core/test_random_runs.py::test_every_seed_is_exact_and_conserves_blocks[0]"
SCHEDULING, PACKED = "tests/core/test_scheduler.py", "tests/core/test_packing.py"

DEFECTS = (
    # ── blocks ───────────────────────────────────────────────────────────────────────────────
    Defect(
        "a block is free while a step in flight still reads it",
        TABLES,
        "        table.is_closed = True\n        if table.steps_in_flight:\n",
        "        table.is_closed = True\n        if False:\n",
        (SCHEDULING,),
    ),
    Defect(
        "the first block of a table is given back twice",
        TABLES,
        "        for block in reversed(table.blocks):\n            self._pool.release(block)\n",
        "        for block in (*reversed(table.blocks), table.blocks[0]):\n"
        "            self._pool.release(block)\n",
        (SCHEDULING,),
    ),
    Defect(
        "the last block of a table does not come home",
        TABLES,
        "        for block in reversed(table.blocks):\n            self._pool.release(block)\n",
        "        for block in reversed(table.blocks[:-1]):\n"
        "            self._pool.release(block)\n",
        (SCHEDULING,),
    ),
    Defect(
        "a block that is not full can be found as a prefix",
        MEMORY,
        "        num_full = end // self.block_size\n",
        "        num_full = -(-end // self.block_size)\n",
        (SCHEDULING, RANDOM_RUNS),
    ),
    Defect(
        "a cached block is evicted for the request that was to use it",
        RECLAIM,
        "    return num_new + sum(\n"
        "        block.state is State.HOST or not (block.refs or block.is_moving)"
        " for block in prefix\n"
        "    )\n",
        "    return num_new\n",
        ("tests/core/memory/test_memory.py",),
    ),
    Defect(
        "what is saved of a block that still grows is taken for its content",
        MEMORY,
        "                self.pool.forget_host(block)\n",
        "                pass\n",
        ("tests/core/memory/test_memory.py", RANDOM_RUNS),
    ),
    Defect(
        "a request whose copy failed goes on with what is not there",
        TABLES,
        "            if table.is_lost:\n",
        "            if False:\n",
        ("tests/core/memory/test_memory.py", RANDOM_RUNS),
    ),
    Defect(
        "one that gave way takes the places of others back at once",
        MEMORY,
        "            if is_early and not self._has_room(num_lacking, num_own):\n",
        "            if False:\n",
        ("tests/core/memory/test_memory.py", RANDOM_RUNS),
    ),
    Defect(
        "KV of a request without numbers is still found as a prefix",
        PREFIX,
        "            self._pool.unpublish(block_hash)\n",
        "            pass\n",
        (SCHEDULING,),
    ),
    Defect(
        "a place on the host is free while its copy runs",
        POOL,
        "        if block.is_moving or block.state is State.GONE:\n",
        "        if block.state is State.GONE:\n",
        ("tests/core/memory/test_pool.py",),
    ),
    Defect(
        "what a copy lost can still be found",
        POOL,
        "        self.device.num_moving -= 1\n        self._contents.forget(block)\n",
        "        self.device.num_moving -= 1\n",
        ("tests/core/memory/test_pool.py",),
    ),
    Defect(
        "the prefix cache gives up what was used last",
        "fastserve/core/memory/tier.py",
        "        return self._cached.popitem(last=False)[0]\n",
        "        return self._cached.popitem()[0]\n",
        ("tests/core/memory/test_pool.py",),
    ),
    Defect(
        "no request that recomputes is exempt from losing its KV again",
        VICTIMS,
        "            or request.is_recomputing\n",
        "",
        (PACKED, SCHEDULING, RANDOM_RUNS),
    ),
    Defect(
        "of equally cold requests the oldest loses its KV",
        RANKING,
        "    return lambda request: (*coldness(request, now), request.handle)\n",
        "    return lambda request: (*coldness(request, now), -request.handle)\n",
        ("tests/core/memory/test_ranking.py", "tests/core/memory/test_victims.py"),
    ),
    Defect(
        "the link never gets rid of its backlog",
        "fastserve/core/memory/link.py",
        "            self._backlog_s[moving.direction] -= moving.copy_s\n",
        "            pass\n",
        ("tests/core/memory/test_link.py",),
    ),
    Defect(
        "requests of different salts share KV",
        REQUEST,
        '    return hashlib.blake2b(salt.encode("utf-8", "surrogatepass")).digest()'
        ' if salt else b""\n',
        '    return b""\n',
        ("tests/core/test_request.py",),
    ),
    Defect(
        "equal blocks behind different beginnings are one",
        REQUEST,
        "                digest = hashlib.sha256(previous)\n",
        "                digest = hashlib.sha256()\n",
        ("tests/core/test_request.py",),
    ),
    # ── steps ────────────────────────────────────────────────────────────────────────────────
    Defect(
        "the terminal event of a finished request is lost",
        SCHEDULER,
        "                    updates.append(self._end(request, reason, (sample,), now, scored))\n",
        "                    self._end(request, reason, (sample,), now, scored)\n",
        (SCHEDULING,),
    ),
    Defect(
        "results of an earlier epoch are taken in",
        SCHEDULER,
        "            sample = next(samples) if work.sample else None\n"
        "            if table.is_closed:\n",
        "            sample = next(samples) if work.sample else None\n"
        "            if request.handle not in self._requests:\n",
        (SCHEDULING, RANDOM_RUNS),
    ),
    Defect(
        "the worker never hears that a request has ended",
        SCHEDULER,
        "            self._forget.append(request.handle)\n",
        "            pass\n",
        (SCHEDULING,),
    ),
    Defect(
        "a failed step ends a request that has begun anew since",
        SCHEDULER,
        "                    for request, table, _ in flight\n"
        "                    if not table.is_closed\n",
        "                    for request, table, _ in flight\n"
        "                    if request.handle in self._requests\n",
        (SCHEDULING,),
    ),
    Defect(
        "a request does not end at its length",
        "fastserve/core/shares.py",
        "FinishReason.LENGTH if request.num_tokens >= request.max_num_tokens else None",
        "FinishReason.LENGTH if request.num_tokens > request.max_num_tokens else None",
        (SCHEDULING,),
    ),
    Defect(
        "chunks of prompts take what the decodes of the step were to have",
        PACKING,
        "                shares.append((request, min(num_tokens, left)))\n",
        "                shares.append((request, num_tokens))\n",
        (PACKED,),
    ),
    Defect(
        "preemptions are counted twice",
        ACCOUNTS,
        "                    self.counters.num_preemptions += 1\n",
        "                    self.counters.num_preemptions += 2\n",
        (SCHEDULING,),
    ),
    Defect(
        "an idle engine keeps the state of its last requests",
        ENGINE,
        "        if self.is_idle:\n            self._submit_plans()\n",
        "        pass\n",
        ("tests/engine/test_engine.py",),
    ),
    # ── the order of requests ────────────────────────────────────────────────────────────────
    Defect(
        "first come is served last",
        f"{POLICIES}/fcfs.py",
        "        return iter(self._requests.values())\n",
        "        return iter(reversed(self._requests.values()))\n",
        (
            f"{POLICY_TESTS}/test_fcfs.py",
            "tests/core/test_three_jobs.py",
        ),
    ),
    Defect(
        "who starves is not promoted",
        f"{POLICIES}/mlfq.py",
        "                del queue[handle]\n                top[handle] = request\n",
        "                pass\n",
        (f"{POLICY_TESTS}/test_mlfq.py",),
    ),
    Defect(
        "the estimated next schedule time counts the own level",
        f"{POLICIES}/mlfq.py",
        "            times.append((num_above * total_s - burnt_s) / self._max_num_seqs)\n",
        "            times.append((num_above * (total_s + quantum) - burnt_s)"
        " / self._max_num_seqs)\n",
        (f"{POLICY_TESTS}/test_mlfq.py",),
    ),
    Defect(
        "a request joins the level above the one that holds its prefill",
        f"{POLICIES}/mlfq.py",
        "            level = self._quanta.holding(prefill_s)\n",
        "            level = max(self._quanta.holding(prefill_s) - 1, 0)\n",
        (f"{POLICY_TESTS}/test_mlfq.py",),
    ),
    Defect(
        "of equal keys the latest comes first",
        f"{POLICIES}/parts.py",
        "        insort(self._order, (key, request.handle, request))\n",
        "        self._order.insert(bisect_left(self._order, (key,)),"
        " (key, request.handle, request))\n",
        (f"{POLICY_TESTS}/test_parts.py",),
    ),
    Defect(
        "a stream may pause for ever",
        f"{POLICIES}/begun.py",
        "                if request.table is not None and not request.steps_in_flight:\n",
        "                if False:\n",
        (f"{POLICY_TESTS}/test_learned.py::test_a_stream_with_kv_pauses_no_longer_than_it_may",),
    ),
    Defect(
        "the class of the lowest priority goes first",
        f"{POLICIES}/priority_classes.py",
        "            self._ranks = sorted(self._classes)\n",
        "            self._ranks = sorted(self._classes, reverse=True)\n",
        (f"{POLICY_TESTS}/test_priority_classes.py",),
    ),
    Defect(
        "what was learned of answer lengths is not restored",
        "fastserve/core/lengths.py",
        '        model._all = _histogram(state["all"])\n',
        "",
        ("tests/core/test_lengths.py",),
    ),
    # ── one request over several engines ─────────────────────────────────────────────────────
    Defect(
        "a request that moves repeats its last token",
        STREAMS,
        "dataclasses.replace(self._arrival, output_token_ids=self.output_token_ids)",
        "dataclasses.replace(self._arrival, output_token_ids=self.output_token_ids[:-1])",
        ("tests/client/test_streams.py", "tests/client/test_dispatch.py"),
    ),
    Defect(
        "scores of a prompt come twice where its request moved",
        STREAMS,
        "            stream._num_to_skip = stream._num_prompt_logprobs\n",
        "            pass\n",
        ("tests/client/test_streams.py",),
    ),
    Defect(
        "what an engine says of a request that another has is heard",
        DISPATCH,
        "                if number in self.streams and link is not None and link.has(number):\n",
        "                if number in self.streams:\n",
        ("tests/client/test_dispatch_replicas.py",),
    ),
    Defect(
        "the requests of a dead replica wait until it is back",
        DISPATCH,
        "            self._fail(culprit, reason)\n        self._hand_over()\n",
        "            self._fail(culprit, reason)\n",
        ("tests/client/test_dispatch_replicas.py",),
    ),
    Defect(
        "a request that kills every engine is never blamed",
        "fastserve/client/suspects.py",
        "        return culprit\n",
        "        return None\n",
        ("tests/client/test_suspects.py",),
    ),
    Defect(
        "the engine process never forgets the number of a request that ended",
        PROCESS,
        "                self._forget(update.handle)\n",
        "                pass\n",
        ("tests/dst/test_seeds.py::test_what_failed_once_does_not_fail_again",),
    ),
    Defect(
        "the work of requests that ended still counts against their replica",
        "fastserve/core/routing.py",
        "replica.work_s - placed.work_s if replica.placed else 0.0",
        "replica.work_s",
        ("tests/core/test_routing.py",),
    ),
    # ── ranks ────────────────────────────────────────────────────────────────────────────────
    Defect(
        "a copy counts as done when the first rank has done it",
        "fastserve/executor/tally.py",
        "            if len(ranks) < self._layout.num_ranks:\n                return\n",
        "            if len(ranks) > 1:\n                return\n",
        ("tests/executor/test_tally.py",),
    ),
    Defect(
        "a copy that failed on one rank of several has succeeded",
        "fastserve/executor/tally.py",
        "        self._in_flight.finish_copy(copy_id, all(ranks))\n",
        "        self._in_flight.finish_copy(copy_id, any(ranks))\n",
        ("tests/executor/test_tally.py",),
    ),
    Defect(
        "a step is told before the one that began before it",
        "fastserve/executor/in_flight.py",
        "            if done is None:\n                break\n",
        "            if done is None:\n                continue\n",
        ("tests/executor/test_in_flight.py",),
    ),
    # ── records ──────────────────────────────────────────────────────────────────────────────
    Defect(
        "the journal does not say which copies failed",
        "fastserve/core/journal.py",
        '                self.write("update", now, done, copies, failed_copies)\n',
        '                self.write("update", now, done, copies, ())\n',
        ("tests/core/test_journal.py",),
    ),
)
