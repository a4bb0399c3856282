"""Train/serve parity: a gateway that watches a simulated fleet's requests shows its policy the world's own View."""

import dataclasses

import numpy as np
import pytest
from test_telemetry import Clock

from envs.fleet.state import ABANDONED, COMPLETED
from envs.scenario import load_scenario
from envs.worlds import FleetWorlds
from marginroute import view as v
from marginroute.bundle import Bundle
from marginroute.guard import GuardLimits
from marginroute.margin_rule import MarginParameters, MarginRule
from marginroute.quality import QualityPrior
from marginroute.response_cache import ResponseCache
from marginroute.rules import LeastInFlight
from marginroute.telemetry import GatewayState

DECISIONS = 400


def bundle_of(plant):
    quality = plant.scenario.workload_spec.quality
    terms = {
        name: {field: float(plant.terms[k][field]) for field in plant.terms.dtype.names}
        for k, name in enumerate(plant.layout.class_names)
    }
    stations = len(plant.layout.station_names)
    return Bundle(
        policy=MarginRule("bid-price", MarginParameters((0.0,) * stations, cap_share=0.05)),
        fallback=LeastInFlight("least-in-flight"),
        limits=GuardLimits(),
        layout=plant.layout,
        static_signals=plant.static_signals,
        slots=plant.slots,
        terms=terms,
        allowed=plant.agreed.allowed,
        output_tokens=plant.output_tokens,
        prior=QualityPrior(
            np.array(quality.prior_ability),
            np.array(quality.slope),
            quality.signal_correlation,
            quality.nobody_can_share,
        ),
        scenario={},
        rate_limits={provider.name: provider.rate_limit for provider in plant.spec.providers},
    )


class Mirror:
    """Replays what happened to the requests of a world since the last decision into a GatewayState."""

    def __init__(self, worlds, state, clock, hashes, store):
        self.worlds, self.state, self.clock, self.hashes, self.store = worlds, state, clock, hashes, store
        self.open = {}  # request -> has its first token
        self.judged = []  # when the judgement of which answer will come in

    def sent(self, i, c):
        layout, load = self.worlds.plant.layout, self.worlds.loads[0, i]
        classes, tasks = layout.class_names[load["class_index"]], layout.task_names[load["task_index"]]
        hashes = self.hashes[i].tolist()
        self.state.begin(str(i), c, int(load["prompt_tokens"]), classes, tasks, hashes=hashes)
        self.open[i] = False

    def judge(self, i):
        load, layout = self.worlds.loads[0, i], self.worlds.plant.layout
        tier = int(layout.tier[load["answered_by"]])
        surprise = float(self.worlds.good[0, i, tier]) - float(self.worlds.prior[0, i, tier])
        self.state.judged(tier, int(load["task_index"]), surprise)

    def catch_up(self, now_s):
        requests, events = self.worlds.fleet.requests[0], []
        for i, started in self.open.items():
            first_s, end_s = requests[i]["first_token_at_s"], requests[i]["completed_at_s"]
            if not started and first_s <= now_s:
                events.append((first_s, 0, i))
            if requests[i]["status"] >= COMPLETED and end_s <= now_s:
                events.append((end_s, 1, i))
        events += [(at_s, 2, i) for at_s, i in self.judged if at_s <= now_s]
        self.judged = [(at_s, i) for at_s, i in self.judged if at_s > now_s]
        for at_s, ended, i in sorted(events):
            self.clock.now_s = at_s
            if ended == 2:
                self.judge(i)
            elif not ended:
                self.state.first_token(str(i))
                self.open[i] = True
            else:
                status = {COMPLETED: "completed", ABANDONED: "abandoned"}.get(int(requests[i]["status"]), "failed")
                self.state.end(str(i), status, int(requests[i]["output_tokens"]))
                if status == "completed":
                    self.store(i, at_s)
                    if self.worlds.loads[0, i]["judged"]:
                        self.judged.append((at_s + float(self.worlds.plant.config[0]["feedback_delay_s"]), i))
                del self.open[i]
        self.clock.now_s = now_s


JUDGED = {"workload.feedback": {"share": 0.4, "delay_s": 5.0}}
BLOCK_TOKENS = 64
CACHING = {f"fleet.pools.{pool}.{key}": value for pool in ("small", "medium") for key, value in (
    ("prefix_caching", True), ("kv_blocks", 2000),
)}  # fmt: skip


def with_prefixes(episode):
    """The episode with prompts most of which go on from an earlier one, as far as they are long enough."""
    rng, lists, fresh = np.random.default_rng(11), [], 0
    for prompt_tokens in episode.prompt_tokens:
        past = lists[rng.integers(max(len(lists) - 30, 0), len(lists))] if lists and rng.random() < 0.7 else []
        shared = past[: prompt_tokens // BLOCK_TOKENS]
        own = prompt_tokens // BLOCK_TOKENS - len(shared)
        lists.append([*shared, *range(fresh, fresh + own)])
        fresh += own
    counts, hashes = [len(own) for own in lists], [block for own in lists for block in own]
    return dataclasses.replace(
        episode, prefix_block_tokens=BLOCK_TOKENS, prefix_count=counts, prefix_hash=np.array(hashes, dtype=np.int64)
    )


SEMANTIC = {
    "workload.recurring.share": 0.0,
    "workload.intents": {"share": 0.9, "per_tenant": 4, "turnover_per_h": 60.0},
    "fleet.response_cache.ttl_s": 20.0,
    "fleet.response_cache.semantic": {"embed_s": 0.02},
}


LIMITED = {"fleet.providers.api.requests_per_minute": 40, "fleet.providers.api.burst_requests": 3} | {
    "fleet.providers.api.tokens_per_minute": 60_000, "fleet.providers.api.burst_tokens": 4_000,
}  # fmt: skip


class Answers:
    """A gateway's response cache beside a world; prompts of different intents have nothing in common."""

    def __init__(self, worlds, episode):
        self.loads, self.layout, self.episode = worlds.loads[0], worlds.plant.layout, episode
        self.ttl_s = float(worlds.plant.config[0]["cache_ttl_s"])
        self.families, self.d = int(episode.family_index.max()) + 1, episode.embedding.shape[1]
        self.cache = ResponseCache(self.families * self.d + episode.n_requests + 1, 2000, self.ttl_s)
        self.keyed = np.flatnonzero(episode.prompt_key >= 0)

    def names(self, i):
        vector = np.zeros(self.families * self.d + self.episode.n_requests + 1)
        family = int(self.episode.family_index[i])
        if family < 0:
            vector[self.families * self.d + self.episode.prompt_key[i]] = 1.0
        else:
            vector[family * self.d : (family + 1) * self.d] = self.episode.embedding[i]
        return str(self.episode.tenant_index[i]), str(self.episode.prompt_key[i]), vector

    def look_up(self, i, now_s):
        return self.cache.look_up(*self.names(i), now_s) if i in self.keyed else None

    def use(self, i, hit):
        self.cache.use(self.names(i)[0], hit.key)

    def store(self, i, at_s):
        if i in self.keyed:
            self.cache.store(*self.names(i), int(self.layout.tier[self.loads[i]["answered_by"]]), at_s)


@pytest.fixture(scope="module", params=["judged", "prefixes", "semantic", "limited"])
def views(request):
    """Pairs of the world's View and the gateway's, decision by decision."""
    caching = request.param == "prefixes"
    overrides = {"judged": JUDGED, "prefixes": CACHING, "semantic": SEMANTIC, "limited": LIMITED}[request.param]
    scenario = load_scenario("quickstart", overrides)
    worlds = FleetWorlds(scenario, 1)
    episode = scenario.generate(3, split="validation")
    episode = with_prefixes(episode) if caching else episode
    hashes = np.split(episode.prefix_hash, np.cumsum(episode.prefix_count)[:-1])
    worlds.load(0, episode)
    bundle, clock = bundle_of(worlds.plant), Clock()
    caps = bundle.policy.in_flight_caps(worlds.plant.layout, worlds.plant.slots)
    worlds.set_in_flight_caps(caps)
    clock.now_s = 0.0
    hold_s = float(worlds.plant.config[0]["hold_s"])
    state = GatewayState(
        bundle, clock, can={"cache", "defer", "shed", "hold"}, hold_s=hold_s, prefix_block_tokens=BLOCK_TOKENS
    )
    answers = Answers(worlds, episode)
    mirror, seen, pairs = Mirror(worlds, state, clock, hashes, answers.store), set(), []
    layout, rng = worlds.plant.layout, np.random.default_rng(5)
    while not worlds.done[0] and len(pairs) < DECISIONS:
        desk = worlds.desks[0]
        i, now_s = int(desk["current"]), float(desk["now_s"])
        mirror.catch_up(now_s)
        theirs = worlds.view()[0].copy()
        for r in range(layout.n_replicas):
            state.scraped(r, *theirs.signals[[v.WAITING, v.RUNNING, v.KV_USAGE, v.TELEMETRY_AGE_S], r])
        load = worlds.loads[0, i]
        serving = np.flatnonzero(np.where(layout.kind == v.PROVIDER, True, theirs.legal) & (layout.kind <= v.PROVIDER))
        cache = layout.names.index("cache")
        hit = answers.look_up(i, now_s)
        ours = state.view(
            int(load["prompt_tokens"]),
            layout.class_names[load["class_index"]],
            layout.task_names[load["task_index"]],
            float(load["difficulty_signal"]),
            waited_s=now_s - load["arrived_at_s"] + (0.02 if request.param == "semantic" else 0.0),
            deadline_left_s=float(load["arrived_at_s"] + load["deadline_s"] - now_s),
            attempt=2 if i in seen else 1,
            available=serving,
            cached=hit,
            hashes=hashes[i].tolist(),
        )
        seen.add(i)
        pairs.append((theirs, ours))
        choice = int(rng.choice(np.flatnonzero(theirs.legal)[:-1]))
        if layout.kind[choice] <= v.PROVIDER:
            mirror.sent(i, choice)
        elif choice == cache:
            answers.use(i, hit)
        worlds.step(np.array([choice]))
    return pairs


EXACT = [name for name in v.SIGNAL_NAMES if name not in ("decoding_tokens", "recent_ttft_s", "recent_tpot_s")]


@pytest.mark.parametrize("name", EXACT)
def test_signal_is_the_worlds(views, name):
    row = v.SIGNAL_NAMES.index(name)
    for theirs, ours in views:
        single = 1e-5 if name in ("similarity", "p_good_prior") else 0.0  # embeddings are single precision
        np.testing.assert_allclose(ours.signals[row], theirs.signals[row], rtol=1e-9 + single, atol=1e-9)


@pytest.mark.parametrize("row", [v.RECENT_TTFT_S, v.RECENT_TPOT_S])
def test_own_latencies_are_the_worlds(views, row):
    for theirs, ours in views:
        np.testing.assert_allclose(ours.signals[row], theirs.signals[row], rtol=1e-6, atol=1e-9)


def test_decoding_tokens_without_progress_reports_are_close(views):
    """The gateway extrapolates streams by recent TPOT; the world knows each token."""
    theirs = np.array([t.signals[v.DECODING_TOKENS] for t, _ in views])
    ours = np.array([o.signals[v.DECODING_TOKENS] for _, o in views])
    busy = theirs > 0
    assert ((ours > 0) == busy).all()
    error = np.abs(ours - theirs)[busy] / theirs[busy]
    assert np.median(error) < 0.03
    assert np.quantile(error, 0.95) < 0.15


@pytest.mark.parametrize("name", v.REQUEST_NAMES)
def test_request_is_the_worlds(views, name):
    row = v.REQUEST_NAMES.index(name)
    tolerance = 1e-6 if name == "expected_output_tokens" else 1e-9
    for theirs, ours in views:
        np.testing.assert_allclose(ours.request[row], theirs.request[row], rtol=tolerance)


def test_legal_is_the_worlds(views):
    for theirs, ours in views:
        assert ours.legal.tolist() == theirs.legal.tolist()


def test_the_providers_limits_were_met(views, request):
    """Under `limited`: nothing but its limits bars the API here, and nobody tells the gateway of them."""
    api = np.array([theirs.legal[3] for theirs, _ in views])
    if request.node.callspec.params["views"] == "limited":
        assert 0.1 < api.mean() < 0.9


def test_prefixes_were_found_and_forgotten(views):
    """Under `prefixes` only: expected at some candidates and not at others, in Views whose pending prefill differs."""
    cached = np.array([theirs.signals[v.CACHED_TOKENS] for theirs, _ in views])
    if cached.any():
        serving = cached[:, :4]  # small, medium, large, api
        assert (serving[:, [0, 1, 3]] > 0).any(axis=0).all() and not serving[:, 2].any()
        assert len(np.unique((serving > 0).sum(axis=1))) > 2


def test_every_kind_of_candidate_was_met(views):
    legal = np.array([theirs.legal for theirs, _ in views])
    assert legal.any(axis=0).all()
    assert max(theirs.signals[v.HELD].max() for theirs, _ in views) > 0
