"""The page at / in headless Chromium. Each check is a function; the last line is JSON."""

import argparse
import fcntl
import json
import os
import pathlib
import pty
import select
import signal
import subprocess
import sys
import tempfile
import termios
import threading
import time
import traceback
import urllib.request

from cluster import Cluster
from playwright.sync_api import expect, sync_playwright
from prometheus_client.parser import text_string_to_metric_families

WAIT_MS = 60_000
PHONE = {"width": 390, "height": 844}
# Assertions wait as long; a machine may have more to do than this.
expect.set_options(timeout=WAIT_MS)
DESK = {"width": 1440, "height": 900}

CHECKS = []


def check(function):
    CHECKS.append(function)
    return function


class Test:
    def __init__(self, cluster, browser, out):
        self.cluster, self.browser, self.out = cluster, browser, out
        self.errors = []
        self.expected_errors = False

    def page(self, path="", url=None, **options):
        context = self.browser.new_context(**{"viewport": DESK, **options})
        context.set_default_timeout(WAIT_MS)
        page = context.new_page()
        page.on("pageerror", lambda error: self.errors.append(f"page: {error}"))
        page.on("console", self.heard)
        page.goto((url or self.cluster.router.url) + "/" + path)
        return page

    def heard(self, message):
        if message.type in ("error", "warning") and not self.expected_errors:
            self.errors.append(f"console: {message.text} ({message.location.get('url')})")

    def ask(self, text="Once upon a time", tokens=24):
        body = {"model": "smol", "prompt": text, "max_tokens": tokens, "ignore_eos": True, "temperature": 0}
        return self.cluster.router.post("/v1/completions", body)


def live(page):
    expect(page.locator("#link-text")).to_have_text("Live")


@check
def renders(test):
    page = test.page()
    live(page)
    expect(page.locator(".node")).to_have_count(2)
    expect(page.locator(".node h3")).to_have_text(["studio", "mini"][::-1])
    expect(page.locator(".node .state")).to_have_text(["ready", "ready"])
    expect(page.locator("#tile-nodes")).to_have_text("2 of 2")
    expect(page.locator("#model option")).to_have_text(["smol"])
    assert "GiB" in page.locator(".node .what").first.inner_text()
    page.context.close()


@check
def figures_are_live(test):
    page = test.page()
    live(page)
    before = page.locator("#requests tr").count()
    running = threading.Thread(target=test.ask, kwargs={"tokens": 300})
    running.start()
    expect(page.locator("#requests-count")).to_contain_text("1 in flight")
    expect(page.locator("#requests tr").first.locator(".state")).to_have_text("writing")
    expect(page.locator("#tile-running")).not_to_have_text("0")
    expect(page.locator("#tile-rate")).not_to_have_text("0.0")
    running.join()
    expect(page.locator("#requests tr").first.locator(".state")).to_have_text("done, at its length")
    assert page.locator("#requests tr").count() == before + 1
    # A busy machine may have it go on at the other.
    assert set(page.locator("#requests tr").first.locator(".way").inner_text().split(" → ")) <= {"studio", "mini"}
    assert page.locator("#requests tr").first.locator(".why").inner_text() != ""
    page.wait_for_function("document.querySelector('#chart-tokens').getAttribute('aria-label').match(/at most [1-9]/)")
    page.context.close()


def short_answer(route):
    """A small model does not know when to end."""
    route.continue_(post_data=json.dumps({**route.request.post_data_json, "max_tokens": 12}))


@check
def the_chat_is_reached_and_used_by_keyboard(test):
    page = test.page()
    live(page)
    page.keyboard.press("Tab")
    expect(page.locator(".skip")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("#say")).to_be_focused()
    page.route("**/v1/chat/completions", short_answer)
    page.keyboard.type("Say hello.")
    page.keyboard.press("Enter")
    answer = page.locator('.said[data-role="assistant"]')
    expect(answer.locator(".note")).to_contain_text("first token after")
    assert answer.locator(".text").inner_text().strip() != ""
    assert any(name in answer.locator(".note").inner_text() for name in ("studio", "mini"))
    page.unroute("**/v1/chat/completions")
    # A long answer is stopped by Escape, and what is there of it stays.
    page.keyboard.type("Write a very long story about the sea.")
    page.keyboard.press("Enter")
    expect(answer.last.locator(".text")).not_to_be_empty()
    page.keyboard.press("Escape")
    expect(answer.last.locator(".note")).to_have_text("stopped")
    expect(page.locator("#requests .state", has_text="client left").first).to_be_visible()
    expect(page.locator("#send")).to_have_text("Send")
    page.screenshot(path=test.out / "light.png")
    page.context.close()


@check
def everything_can_be_reached_by_tab(test):
    page = test.page()
    live(page)
    seen = []
    for _ in range(14):
        page.keyboard.press("Tab")
        seen.append(page.evaluate("document.activeElement.id || document.activeElement.className"))
    for wanted in ("key-open", "chat-new", "say", "send", "card scroll"):
        assert wanted in seen, f"{wanted} is not among {seen}"
    page.context.close()


@check
def a_restart_of_the_router_is_survived(test):
    page = test.page()
    live(page)
    page.evaluate("window.stayed = true")
    test.expected_errors = True
    try:
        test.cluster.router.stop()
        expect(page.locator("#link-text")).to_have_text("Reconnecting")
        test.cluster.router.start()
        test.cluster.router.wait(2)
        live(page)
    finally:
        test.expected_errors = False
    expect(page.locator(".node .state")).to_have_text(["ready", "ready"])
    assert page.evaluate("window.stayed") is True, "the page was not loaded again"
    test.ask()
    expect(page.locator("#requests .state").first).to_have_text("done, at its length")
    page.context.close()


@check
def an_open_page_does_not_hold_the_router_up(test):
    page = test.page()
    live(page)
    test.expected_errors = True
    try:
        started = time.monotonic()
        test.cluster.router.stop(signal.SIGINT)
        took = time.monotonic() - started
        test.cluster.router.start()
        test.cluster.router.wait(2)
        live(page)
    finally:
        test.expected_errors = False
    assert took < 4, f"it took {took:.1f} s to stop"
    page.context.close()


@check
def a_lost_node_is_shown_and_its_request_goes_on(test):
    page = test.page()
    live(page)
    thread = threading.Thread(target=test.ask, kwargs={"text": "The sea", "tokens": 400})
    thread.start()
    row = page.locator("#requests tr").first
    expect(row.locator(".state")).to_have_text("writing")
    name = row.locator(".way").inner_text().split(" → ")[-1]
    node = next(node for node in test.cluster.nodes if name in node.arguments)
    node.stop(signal.SIGKILL)
    expect(page.locator(".node")).to_have_count(1)
    expect(row.locator(".why")).to_contain_text("went on on")
    expect(row.locator(".way")).to_contain_text(f"{name} →")
    thread.join()
    page.screenshot(path=test.out / "failover.png")
    node.start()
    test.cluster.router.wait(2)
    expect(page.locator(".node")).to_have_count(2)
    page.context.close()


@check
def a_key_can_be_given_and_is_kept_for_the_tab_only(test):
    test.cluster.locked.start()
    test.cluster.locked.wait(0)
    test.expected_errors = True
    try:
        page = test.page(url=test.cluster.locked.url)
        expect(page.locator("#banner")).to_contain_text("API key")
        expect(page.locator("#link-text")).to_have_text("Key needed")
        for given, state in (("wrong-key", "Key needed"), ("right-key", "Live")):
            page.locator("#key-open").click()
            page.keyboard.type(given) if given == "wrong-key" else page.locator("#key").fill(given)
            page.keyboard.press("Enter")
            expect(page.locator("#key-dialog")).to_be_hidden()
            expect(page.locator("#link-text")).to_have_text(state)
    finally:
        test.expected_errors = False
    expect(page.locator("#banner")).to_be_hidden()
    expect(page.locator("#nodes-none")).to_contain_text("No node has joined")
    stores = page.evaluate("[Object.values(sessionStorage), Object.values(localStorage), document.cookie]")
    assert stores == [["right-key"], [], ""], stores
    page.reload()
    live(page)
    page.locator("#key-open").click()
    page.locator("#key-forget").click()
    assert page.evaluate("sessionStorage.length") == 0
    page.context.close()
    test.errors = [error for error in test.errors if "401" not in error]


@check
def dark_and_phone(test):
    test.ask("Dark and light", 40)
    for name, options in {
        "dark": {"color_scheme": "dark"},
        "phone": {"viewport": PHONE, "has_touch": True, "device_scale_factor": 2},
        "phone-dark": {"viewport": PHONE, "color_scheme": "dark", "device_scale_factor": 2},
        "tablet": {"viewport": {"width": 820, "height": 1180}},
        "narrow": {"viewport": {"width": 320, "height": 700}},
    }.items():
        page = test.page(**options)
        live(page)
        expect(page.locator(".node")).to_have_count(2)
        if name.startswith("phone"):
            page.locator("#say").fill("What is a cluster?")
            page.keyboard.press("Enter")
            expect(page.locator('.said[data-role="assistant"] .text')).not_to_be_empty()
            page.keyboard.press("Escape")
        wide, shown = page.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
        assert wide <= shown, f"{name}: {wide} pixels wide on a screen of {shown}"
        page.evaluate("scrollTo(0, 0)")
        page.screenshot(path=test.out / f"{name}.png", full_page=True)
        dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(15, 17, 21)"
        assert dark == ("dark" in name), name
        page.context.close()


@check
def texts_have_contrast(test):
    """WCAG AA: 4.5 to 1 for each text on what is behind it."""
    script = """() => {
      const parse = (text) => text.match(/[\\d.]+/g).map(Number);
      const luminance = ([r, g, b]) => [r, g, b].map((c) => c / 255)
        .map((c) => (c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
        .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
      const behind = (element) => {
        for (; element; element = element.parentElement) {
          const color = parse(getComputedStyle(element).backgroundColor);
          if (color.length === 3 || color[3] === 1) return color;
        }
        return [255, 255, 255];
      };
      return [...document.querySelectorAll("body *")].filter((element) =>
        element.offsetParent && [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim())
      ).map((element) => {
        const [a, b] = [luminance(parse(getComputedStyle(element).color)), luminance(behind(element))];
        return [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), element.outerHTML.slice(0, 90)];
      }).filter(([ratio]) => ratio < 4.5);
    }"""
    for scheme in ("light", "dark"):
        page = test.page(color_scheme=scheme)
        live(page)
        poor = page.evaluate(script)
        assert poor == [], f"{scheme}: {poor}"
        page.context.close()


@check
def metrics_are_what_prometheus_reads(test):
    test.ask(tokens=8)
    families = {family.name: family for family in text_string_to_metric_families(test.cluster.router.get("/metrics"))}
    samples = {sample.name: sample.value for family in families.values() for sample in family.samples if family.samples}
    assert samples["mlx_generation_tokens_total"] >= 8
    assert samples["mlx_time_to_first_token_seconds_count"] >= 1
    names = {sample.labels["node"] for sample in families["mlx_num_requests_running"].samples}
    assert names == {"studio", "mini"}, names
    assert {"mlx_node_rtt_seconds", "mlx_kv_cache_usage_perc", "mlx_routes"} <= families.keys(), families.keys()


@check
def logs_name_each_request_and_nothing_of_it(test):
    words = "Zanzibar quokka"
    body = json.dumps({"model": "smol", "prompt": words, "max_tokens": 4}).encode()
    url = test.cluster.router.url + "/v1/completions"
    request = urllib.request.Request(url, body, {"content-type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        answer.read()
        request_id, node = answer.headers["x-request-id"], answer.headers["x-mlx-route"].split(";")[0]
    time.sleep(0.5)
    logs = {process.log.stem: process.log.read_text() for process in [test.cluster.router, *test.cluster.nodes]}
    said = {name: [line for line in log.splitlines() if request_id in line] for name, log in logs.items()}
    for name, wanted in (("router", ["routed", "text ended", "answered"]), (node, ["taken", "submitted", "finished"])):
        for word in wanted:
            assert any(word in line for line in said[name]), f"{word!r} is not in {said[name]}"
    secrets = [words, "Zanzibar", test.cluster.key, "right-key"]
    assert not [secret for secret in secrets for log in logs.values() if secret in log]


@check
def the_terminal_chat_goes_on_after_ctrl_c(test):
    router = test.cluster.router
    arguments = [router.arguments[0], "chat", "--http", f"127.0.0.1:{router.http}", "--temperature", "0"]
    master, slave = pty.openpty()
    child = subprocess.Popen(arguments, stdin=slave, stdout=slave, stderr=slave, env=router.environment, start_new_session=True,
                             preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0))
    os.close(slave)
    seen = ""

    def until(wanted):
        nonlocal seen
        end = time.monotonic() + WAIT_MS / 1000
        while wanted not in seen:
            assert time.monotonic() < end and child.poll() is None, f"{wanted!r} is not in {seen!r}"
            if select.select([master], [], [], 0.2)[0]:
                seen += os.read(master, 4096).decode(errors="replace")
        before, seen = seen.split(wanted, 1)
        return before

    until("> ")
    os.write(master, b"Write a long story about the sea.\n")
    until("sea.\r\n")
    end = time.monotonic() + WAIT_MS / 1000
    while not seen.strip() and time.monotonic() < end:
        seen += os.read(master, 4096).decode(errors="replace")
    os.write(master, b"\x03")
    until("> ")
    os.write(master, b"/new\n")
    until("A new conversation.")
    os.write(master, b"/quit\n")
    assert child.wait(10) == 0
    os.close(master)


@check
def scripts_of_others_do_not_run(test):
    page = test.page()
    live(page)
    test.expected_errors = True
    page.evaluate("""() => {
      const script = document.createElement("script");
      script.textContent = "window.injected = true";
      document.body.append(script);
    }""")
    assert page.evaluate("window.injected") is None
    test.expected_errors = False
    page.context.close()


@check
def nothing_was_complained_of(test):
    assert test.errors == [], "\n".join(test.errors)


def main():
    arguments = argparse.ArgumentParser()
    for name in ("binary", "model", "chromium", "out"):
        arguments.add_argument(f"--{name}", required=True)
    arguments.add_argument("--only", help="only checks with this in their names")
    given = arguments.parse_args()
    out = pathlib.Path(given.out)
    out.mkdir(parents=True, exist_ok=True)
    passed, failed = 0, []
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=given.chromium, args=["--no-sandbox"])
        with Cluster(given.binary, given.model, folder, ["studio", "mini"]) as cluster:
            test = Test(cluster, browser, out)
            for one in (one for one in CHECKS if (given.only or "") in one.__name__):
                started = time.monotonic()
                try:
                    one(test)
                    passed += 1
                    print(f"ok      {one.__name__} ({time.monotonic() - started:.1f} s)", flush=True)
                except Exception:
                    failed.append(one.__name__)
                    print(f"FAILED  {one.__name__}", flush=True)
                    traceback.print_exc(file=sys.stdout)
        browser.close()
    print(json.dumps({"passed": passed, "failed": len(failed), "failures": failed, "screenshots": str(out)}))
    sys.exit(bool(failed))


main()
