//! The console page, and a browser's own EventSource, in a real browser: Chromium, driven by WebDriver.

use crate::support::*;
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};

/// A browser with one window.
struct Browser {
    driver: Child,
    session: String,
    _profile: Folder,
}

impl Browser {
    fn open(url: &str) -> Browser {
        let mut driver = Command::new("chromedriver")
            .arg("--port=0")
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(driver.stdout.take().unwrap()).lines();
        let line = lines
            .find(|line| line.as_ref().unwrap().contains("successfully on port"))
            .unwrap()
            .unwrap();
        std::thread::spawn(move || lines.for_each(drop));
        let port = line.trim_end_matches('.').rsplit(' ').next().unwrap().to_string();
        let profile = Folder::new();
        let flags = [
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--disable-dev-shm-usage",
            "--window-size=1000,700",
            // Another site's name that has come to mean this host, as DNS rebinding has it.
            "--host-resolver-rules=MAP evil.test 127.0.0.1",
        ];
        let flags: Vec<_> = flags.iter().map(|flag| format!("\"{flag}\"")).collect();
        let options = format!(
            "{{\"args\":[{},\"--user-data-dir={}\"]}}",
            flags.join(","),
            profile.path("profile")
        );
        let capabilities = format!(
            "{{\"capabilities\":{{\"alwaysMatch\":{{\"goog:chromeOptions\":{options}}}}}}}"
        );
        let base = format!("http://127.0.0.1:{port}/session");
        let answer = ureq::post(&base)
            .send(capabilities.as_str())
            .unwrap()
            .body_mut()
            .read_to_string()
            .unwrap();
        let id = answer.split("\"sessionId\":\"").nth(1).unwrap().split('"').next().unwrap();
        let browser = Browser { driver, session: format!("{base}/{id}"), _profile: profile };
        browser.go(url);
        browser
    }

    fn post(&self, path: &str, content: &str) -> String {
        let request = ureq::post(format!("{}/{path}", self.session));
        let request = request.config().http_status_as_error(false).build();
        let answer = request.send(content).unwrap().body_mut().read_to_string().unwrap();
        assert!(!answer.starts_with("{\"value\":{\"error\""), "{content}: {answer}");
        answer
    }

    fn go(&self, url: &str) {
        self.post("url", &format!("{{\"url\":{}}}", json(url)));
    }

    /// What a function's body returns, as text.
    fn script(&self, body: &str) -> String {
        let script = format!("return String((() => {{ {body} }})())");
        let answer =
            self.post("execute/sync", &format!("{{\"script\":{},\"args\":[]}}", json(&script)));
        let text = answer.strip_prefix("{\"value\":\"").and_then(|rest| rest.strip_suffix("\"}"));
        let text = text.unwrap_or_else(|| panic!("{body}: {answer}"));
        text.replace("\\n", "\n")
            .replace("\\\"", "\"")
            .replace("\\u003C", "<")
            .replace("\\\\", "\\")
    }

    fn until(&self, what: &str, body: &str) {
        wait_for(what, || self.script(body) == "true");
    }

    /// Types into the focused element; `\u{e007}` is Enter, `\u{e013}` and `\u{e015}` the arrows, `\u{e008}` Shift down until `\u{e000}`.
    fn keys(&self, text: &str) {
        let key = |kind: &str, key: char| {
            format!("{{\"type\":\"{kind}\",\"value\":{}}}", json(&key.to_string()))
        };
        let mut actions = Vec::new();
        for character in text.chars() {
            match character {
                '\u{e008}' => actions.push(key("keyDown", character)),
                '\u{e000}' => actions.push(key("keyUp", '\u{e008}')),
                _ => actions.extend([key("keyDown", character), key("keyUp", character)]),
            }
        }
        self.post(
            "actions",
            &format!(
                "{{\"actions\":[{{\"type\":\"key\",\"id\":\"k\",\"actions\":[{}]}}]}}",
                actions.join(",")
            ),
        );
    }

    /// Types a command into its field, without Enter.
    fn type_in(&self, command: &str) {
        self.script(&format!("{COMMAND}.value = ''; {COMMAND}.focus()"));
        // Enter alone runs, Shift+Enter begins another line.
        self.keys(&command.replace('\n', "\u{e008}\u{e007}\u{e000}"));
    }

    fn run(&self, command: &str) {
        self.type_in(command);
        self.keys("\u{e007}");
    }

    /// Runs a command to its end, which is in these words.
    fn runs_to(&self, command: &str, status: &str) {
        let runs = self.count();
        self.run(command);
        wait_for("a new entry", || self.count() > runs);
        self.ends_as(status);
    }

    fn count(&self) -> usize {
        self.script("return document.querySelectorAll('article').length").parse().unwrap()
    }

    fn status(&self) -> String {
        self.script("return document.querySelector('[role=status]').textContent")
    }

    fn title(&self) -> String {
        self.script("return document.title")
    }

    /// What an expression about the latest run's `article` gives.
    fn latest(&self, expression: &str) -> String {
        self.script(&format!(
            "const article = [...document.querySelectorAll('[role=log][aria-label=Output] article')].at(-1); return {expression}"
        ))
    }

    fn output(&self) -> String {
        self.latest("article.querySelector('[data-part=output]').textContent")
    }

    fn state(&self) -> String {
        self.latest("article.dataset.state")
    }

    fn is_in(&self, state: &str) {
        wait_for(&format!("the state {state}"), || self.state() == state);
    }

    /// Presses the last of the buttons with this name, of those that are to be seen.
    fn press(&self, name: &str) {
        self.script(&format!(
            "[...document.querySelectorAll('button')].filter((each) => each.checkVisibility() && each.textContent === '{name}').at(-1).click()"
        ));
    }

    fn ends_as(&self, status: &str) {
        self.until(
            &format!("the status {status}"),
            &format!(
                "return document.querySelector('[role=status]').textContent.startsWith('{status}')"
            ),
        );
    }

    fn tool(&self, command: &str, parameters: &str) -> String {
        self.post(
            "goog/cdp/execute",
            &format!("{{\"cmd\":\"{command}\",\"params\":{{{parameters}}}}}"),
        )
    }

    /// A window of this size; `kind` has the other settings of `Emulation.setDeviceMetricsOverride`.
    fn resize(&self, width: u32, height: u32, is_phone: bool) {
        let size = format!("\"width\":{width},\"height\":{height}");
        let metrics = format!("{size},\"deviceScaleFactor\":1,\"mobile\":{is_phone}");
        self.tool("Emulation.setDeviceMetricsOverride", &metrics);
        if is_phone {
            let touch = "\"enabled\":true,\"maxTouchPoints\":1";
            self.tool("Emulation.setTouchEmulationEnabled", touch);
        }
    }

    /// The name and the content of the file that Save gives for the latest run.
    fn saved(&self) -> (String, String) {
        let folder = Folder::new();
        let place = json(folder.0.to_str().unwrap());
        let settings = format!("\"behavior\":\"allow\",\"downloadPath\":{place}");
        self.tool("Browser.setDownloadBehavior", &settings);
        self.press("Save");
        let (mut name, mut text) = (String::new(), String::new());
        // Chromium may reserve the name by an empty file, before it renames the whole one.
        wait_for("the file", || {
            let names = std::fs::read_dir(&folder.0).unwrap();
            let mut names = names.map(|entry| entry.unwrap().file_name().into_string().unwrap());
            name = names.find(|name| name.ends_with(".txt")).unwrap_or_default();
            text = std::fs::read_to_string(folder.path(&name)).unwrap_or_default();
            !name.is_empty() && !text.is_empty()
        });
        (name, text)
    }

    fn prefers(&self, scheme: &str) {
        let feature = format!("{{\"name\":\"prefers-color-scheme\",\"value\":\"{scheme}\"}}");
        self.tool("Emulation.setEmulatedMedia", &format!("\"features\":[{feature}]"));
    }

    /// Taps with a finger where this element is; it has to be in sight, and large enough.
    fn tap(&self, element: &str) {
        let place = self.script(&format!(
            "const {{ left, top, width, height }} = ({element}).getBoundingClientRect(); \
             const [x, y] = [Math.round(left + width / 2), Math.round(top + height / 2)]; \
             const isThere = ({element}).contains(document.elementFromPoint(x, y)); \
             return [isThere && height >= 44, x, y].join()"
        ));
        let [is_good, x, y] = place.split(',').collect::<Vec<_>>()[..] else { panic!("{place}") };
        assert_eq!(is_good, "true", "{element} is no place to tap");
        let steps = format!(
            "{{\"type\":\"pointerMove\",\"x\":{x},\"y\":{y}}},{{\"type\":\"pointerDown\",\"button\":0}},{{\"type\":\"pointerUp\",\"button\":0}}"
        );
        let finger = "\"type\":\"pointer\",\"id\":\"f\",\"parameters\":{\"pointerType\":\"touch\"}";
        self.post("actions", &format!("{{\"actions\":[{{{finger},\"actions\":[{steps}]}}]}}"));
    }
}

/// The field for the command, as JavaScript.
const COMMAND: &str = "document.querySelector('[aria-label=Command]')";

fn button(name: &str) -> String {
    format!(
        "[...document.querySelectorAll('button')].filter((each) => each.checkVisibility() && each.textContent === '{name}').at(-1)"
    )
}

impl Drop for Browser {
    fn drop(&mut self) {
        let _ = ureq::delete(&self.session).call();
        let _ = self.driver.kill();
        let _ = self.driver.wait();
    }
}

fn json(text: &str) -> String {
    let escape = |character: char| match character {
        '"' | '\\' => format!("\\{character}"),
        ' '..='~' => character.to_string(),
        other => format!("\\u{:04x}", u32::from(other)),
    };
    format!("\"{}\"", text.chars().map(escape).collect::<String>())
}

/// The address of a page that is not the server's.
fn other_site(page: &str) -> std::net::SocketAddr {
    use std::io::{Read, Write};
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let response = format!(
        "HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{page}",
        page.len()
    );
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            // A browser also opens connections on which it says nothing.
            let response = response.clone();
            std::thread::spawn(move || {
                let _ = stream.read(&mut [0; 4096]);
                let _ = stream.write_all(response.as_bytes());
            });
        }
    });
    address
}

fn console(options: &[&str]) -> (Server, Browser) {
    let server = Server::start(options);
    let browser = Browser::open(&format!("http://{}/", server.address));
    (server, browser)
}

#[test]
#[ignore = "needs chromium and chromedriver"]
fn browser_page_runs_commands() {
    let (server, browser) = console(&[]);
    assert_eq!(browser.status(), "ready");
    assert_eq!(browser.title(), format!("ready – {}", server.address));
    // The empty page says where it is, and offers what could be run.
    let welcome = browser.script("return document.querySelector('main').textContent");
    assert!(welcome.contains(&server.address) && welcome.contains("df -h"), "{welcome}");
    browser.runs_to("sh -c 'echo out; echo err >&2; exit 3'", "exited 3");
    assert_eq!(browser.state(), "exited");
    assert_eq!(browser.title(), format!("exited 3 – {}", server.address));
    let errors = "[...article.querySelectorAll('[data-stream=stderr]')].map((each) => each.textContent).join('')";
    assert_eq!(browser.latest(errors), "err");
    assert!(browser.output().contains("out\n") && browser.output().contains("err\n"));
    browser.runs_to("sh -c 'kill -9 $$'", "killed by signal 9");
    assert_eq!((browser.state().as_str(), browser.output().as_str()), ("killed", ""));
    browser.runs_to("nonesuch", "not started: ");
    assert_eq!(browser.state(), "failed");
    assert!(browser.status().contains("nonesuch"), "{}", browser.status());
    browser.runs_to("'open", "not started: ");
    assert!(browser.status().contains("quote"), "{}", browser.status());
    // Live: the command waits for a file that is made once its output is there.
    let folder = Folder::new();
    let gate = folder.path("gate");
    browser.run(&format!("sh -c 'echo live; until [ -e {gate} ]; do sleep 0.02; done; echo over'"));
    wait_for("live output", || browser.output() == "live\n");
    assert_eq!(browser.state(), "running");
    wait_for("the amount", || {
        browser.status().starts_with("running ") && browser.status().ends_with(" · 5 B")
    });
    folder.write("gate", "");
    browser.ends_as("exited 0");
    assert_eq!(browser.output(), "live\nover\n");
    // Several lines are a command too.
    browser.runs_to("echo a\nb", "exited 0");
    assert_eq!(browser.output(), "a b\n");
    assert_eq!(browser.latest("article.ariaLabel"), "echo a\nb");
}

#[test]
#[ignore = "needs chromium and chromedriver"]
fn browser_page_is_a_transcript() {
    let (_server, browser) = console(&[]);
    let first = "document.querySelector('article').textContent";
    browser.runs_to("seq 100", "exited 0");
    let before = browser.script(&format!("return {first}"));
    assert!(
        before.contains("seq 100") && before.contains("exited 0") && before.contains("99\n100")
    );
    assert_eq!(browser.script(&format!("return {COMMAND}.value")), "");
    browser.runs_to("echo two", "exited 0");
    browser.runs_to("echo three", "exited 0");
    let names =
        "[...document.querySelectorAll('article')].map((each) => each.ariaLabel).join('; ')";
    assert_eq!(browser.script(&format!("return {names}")), "seq 100; echo two; echo three");
    // The first is folded, still whole, and can be unfolded.
    assert_eq!(browser.script(&format!("return {first}")).replace("Unfold", ""), before);
    let height = "return document.querySelector('[data-part=output]').clientHeight";
    assert!(browser.script(height).parse::<u32>().unwrap() < 200);
    browser.press("Unfold");
    assert!(browser.script(height).parse::<u32>().unwrap() > 1000);
    browser.press("Fold");
    // Run once more, as what it was.
    browser.script(
        "[...document.querySelectorAll('article:nth-child(2) button')].find((each) => each.textContent === 'Re-run').click()",
    );
    wait_for("a fourth entry", || browser.count() == 4);
    browser.is_in("exited");
    assert_eq!((browser.output().as_str(), browser.count()), ("two\n", 4));
    // Copy and Save give all that was printed, the dropped lines too.
    browser.runs_to("seq 20000", "exited 0");
    browser.script("addEventListener('copy', (event) => { window.copied = event.clipboardData.getData('text/plain'); })");
    browser.press("Copy");
    let whole: String = (1..=20000).map(|number| format!("{number}\n")).collect();
    assert!(browser.script("return window.copied") == whole);
    let (name, text) = browser.saved();
    assert!(name.starts_with("127.0.0.1-") && name.contains("-seq-20000-20"), "{name}");
    assert!(text == whole);
}

#[test]
#[ignore = "needs chromium and chromedriver"]
fn browser_page_has_a_shell_an_input_a_history_and_links() {
    let (server, browser) = console(&[]);
    let shell = "document.querySelector('input[role=switch]')";
    assert_eq!(browser.script(&format!("return {shell}.labels[0].textContent")), "Shell");
    let field = format!("return {COMMAND}.value");
    // What looks like shell gets a hint, and runs as it is.
    let hint = "const hint = document.getElementById(document.querySelector('[aria-label=Command]').getAttribute('aria-describedby')); return hint.checkVisibility() ? hint.textContent : ''";
    browser.type_in("echo 'a | b'");
    assert_eq!(browser.script(hint), "");
    browser.type_in("echo it | wc -l");
    assert!(browser.script(hint).contains("Shell"));
    browser.keys("\u{e007}");
    browser.is_in("exited");
    assert_eq!(browser.output(), "it | wc -l\n");
    browser.script(&format!("{shell}.click()"));
    browser.runs_to("x='it'\"'\"'s'; cd / && echo $x | cat; pwd", "exited 0");
    assert_eq!(browser.output(), "it's\n/\n");
    browser.script(&format!("{shell}.click()"));
    // What the command reads.
    browser.press("Input");
    browser.keys("pears\napples\n");
    browser.runs_to("sort", "exited 0");
    assert_eq!(browser.output(), "apples\npears\n");
    browser.script("document.querySelector('[aria-label=Input]').value = ''");
    browser.press("Input");
    // History: most recent first, without doubles; a draft is kept.
    browser.runs_to("echo one", "exited 0");
    browser.runs_to("nonesuch", "not started");
    browser.runs_to("echo one", "exited 0");
    browser.type_in("draft");
    browser.keys("\u{e013}");
    assert_eq!(browser.script(&field), "echo one");
    browser.keys("\u{e013}");
    assert_eq!(browser.script(&field), "nonesuch");
    browser.keys("\u{e015}\u{e015}");
    assert_eq!(browser.script(&field), "draft");
    // It is kept, and opens as a list.
    browser.go(&format!("http://{}/", server.address));
    browser.press("History");
    browser.press("sort");
    assert_eq!(browser.script(&field), "sort");
    assert_eq!(browser.count(), 0);
    // A link fills the field in, and runs nothing.
    let folder = Folder::new();
    let linked = folder.path("linked");
    browser.go("about:blank");
    browser.go(&format!("http://{}/#touch%20{linked}", server.address));
    assert_eq!(browser.script(&field), format!("touch {linked}"));
    assert!(!server.log().contains("linked"));
}

#[test]
#[ignore = "needs chromium and chromedriver"]
fn browser_page_ends_commands_on_purpose_only() {
    let (mut server, browser) = console(&[]);
    let asks = "const event = new Event('beforeunload', { cancelable: true }); dispatchEvent(event); return event.defaultPrevented";
    let begin = |number: usize| {
        browser.run("sleep 1000");
        wait_for("the command", || {
            server.log().matches("command=\"sleep 1000\"").count() == number
        });
        browser.is_in("running");
        *server.children().last().unwrap()
    };
    assert_eq!(browser.script(asks), "false");
    let pid = begin(1);
    assert_eq!(browser.script(asks), "true");
    assert_eq!(browser.title(), format!("running – {}", server.address));
    // Enter, with and without a next command in the field, and Re-run end nothing and start nothing.
    browser.keys("\u{e007}\u{e007}echo next\u{e007}");
    browser.press("Re-run");
    assert_eq!(browser.script(&format!("return {COMMAND}.value")), "echo next");
    assert_eq!((browser.state().as_str(), browser.count()), ("running", 1));
    assert!(is_alive(pid) && server.children() == [pid]);
    assert_eq!(browser.script(&format!("return {} === undefined", button("Run"))), "true");
    browser.press("Stop");
    browser.ends_as("stopped");
    assert_eq!(browser.state(), "stopped");
    assert_eq!(browser.script(asks), "false");
    is_gone(pid);
    // A double click is one click.
    browser.type_in("sleep 1000");
    browser.script(&format!(
        "const button = {}; for (const detail of [1, 2]) button.dispatchEvent(new PointerEvent('click', {{ detail, pointerType: 'mouse' }}))",
        button("Run")
    ));
    browser.is_in("running");
    browser.press("Stop");
    browser.is_in("stopped");
    let pid = begin(3);
    browser.go("about:blank");
    is_gone(pid);
    browser.go(&format!("http://{}/", server.address));
    begin(4);
    signal_process(server.pid, "KILL");
    server.process.wait().unwrap();
    browser.ends_as("connection lost");
    assert_eq!(browser.state(), "lost");
}

#[test]
#[ignore = "needs chromium and chromedriver"]
fn browser_page_tells_true_states() {
    let (server, browser) = console(&["--heartbeat", "0.3", "--timeout", "8"]);
    // A server that hangs, first before it has begun, then while a command runs.
    signal_process(server.pid, "STOP");
    browser.run("sleep 1000");
    wait_for("the clock", || {
        let status = browser.status();
        status.starts_with("waiting") && !status.contains(" ms")
    });
    assert_eq!(browser.state(), "waiting");
    signal_process(server.pid, "CONT");
    browser.is_in("running");
    signal_process(server.pid, "STOP");
    browser.ends_as("no word from the server");
    assert_eq!(browser.state(), "running");
    signal_process(server.pid, "CONT");
    browser.ends_as("running");
    browser.ends_as("killed by timeout");
    assert_eq!(browser.state(), "killed");
    assert!(browser.latest("article.textContent").contains("--timeout"));
    browser.run("sleep 1000");
    browser.is_in("running");
    server.signal("TERM");
    browser.ends_as("killed by shutdown");
    browser.runs_to("true", "connection lost");
}

#[test]
#[ignore = "needs chromium and chromedriver"]
fn browser_page_tells_of_an_end_in_a_hidden_tab() {
    let (server, browser) = console(&[]);
    browser.run("sh -c 'sleep 10.5; seq 100000'");
    browser.is_in("running");
    let answer = browser.post("window/new", "{\"type\":\"tab\"}");
    let handle = answer.split("\"handle\":\"").nth(1).unwrap().split('"').next().unwrap();
    browser.post("window", &format!("{{\"handle\":\"{handle}\"}}"));
    // To ask the tab itself would bring it to the front.
    let title = format!("(ended) exited 0 \u{2013} {}", server.address);
    wait_for("the title", || browser.tool("Target.getTargets", "").contains(&title));
}

#[test]
#[ignore = "needs chromium and chromedriver"]
fn browser_page_shows_output_as_a_terminal_does() {
    let (_server, browser) = console(&[]);
    let shows = |command: &str, output: &str| {
        browser.runs_to(command, "exited 0");
        assert_eq!(browser.output(), output, "{command}");
    };
    // The style of the piece with this text.
    let style = |text: &str, property: &str| {
        browser.latest(&format!(
            "getComputedStyle([...article.querySelectorAll('[data-part=output] span')].findLast((each) => each.textContent === '{text}')).{property}"
        ))
    };
    shows(
        "printf '<img src=x onerror=document.title=1><b>'",
        "<img src=x onerror=document.title=1><b>",
    );
    assert_eq!(browser.script("return document.querySelectorAll('[role=log] img').length"), "0");
    shows(
        "printf 'a\\033[31mred\\033[0m\\033[2J\\033]0;title\\007b\\033[1;38;5;196mc\\033[0md'",
        "aredbcd",
    );
    let plain = browser.script("return getComputedStyle(document.body).color");
    assert!(style("red", "color") != plain && style("c", "color") != plain);
    assert_eq!(style("c", "fontWeight"), "700");
    shows("printf '10%%\\r100%%\\nab\\bc\\tx\\nlong\\rs\\033[K!'", "100%\nac      x\ns!");
    shows(
        "printf '\\033[38:2::255:0:0mcolon\\033[m \\033[38;2;0;128;0;4mlist\\033[m \\033[4:3mcurl\\033[4:0mnone \\033[58;5;1mfive\\033[58:2::1:3:9mtwo'",
        "colon list curlnone fivetwo",
    );
    assert_eq!(style("colon", "color"), "rgb(255, 0, 0)");
    assert_eq!(style("list", "color"), "rgb(0, 128, 0)");
    assert!(style("list", "textDecoration").contains("underline"));
    assert!(style("curl", "textDecoration").contains("underline"));
    assert_eq!(style("curl", "fontStyle"), "normal");
    assert!(browser.output().ends_with("none fivetwo"));
    // DCS, APC, PM, SOS and OSC with either end; what only looks like SGR.
    shows(
        "printf 'a\\033Pq#0;2;0\\033\\\\b\\033_Gi=1;AAAA\\033\\\\c\\033^x\\033\\\\d\\033Xy\\033\\\\e\\033]8;;http://x\\033\\\\f\\033[>4;2mg\\033(Bh'",
        "abcdefgh",
    );
    // An escape that comes in two pieces, and two streams whose last lines do not mix.
    shows("sh -c 'printf \"x\\033[3\"; sleep 0.3; printf \"1my\"'", "xy");
    shows(
        "sh -c 'printf \"10%%\" >&2; sleep 0.3; echo out; sleep 0.3; printf \"\\r99%%\\n\" >&2'",
        "out\n99%\n",
    );
    // stderr is told by an edge, not by its colour.
    assert_eq!(style("99%", "color"), plain);
    assert_ne!(
        browser.latest(
            "getComputedStyle(article.querySelector('[data-stream=stderr]').parentElement).boxShadow"
        ),
        "none"
    );
}

/// What a page has to stand: as long as it does, it draws, and a finger gets an answer.
const FRAMES: &str = "window.gaps = []; let last = performance.now(); \
    const frame = (now) => { window.gaps.push(now - last); last = now; requestAnimationFrame(frame); }; \
    requestAnimationFrame(frame);";

#[test]
#[ignore = "needs chromium and chromedriver"]
fn browser_page_stays_responsive_under_a_flood() {
    let (server, browser) = console(&[]);
    let is_fluent = || {
        let slowest = "const gaps = window.gaps.sort((a, b) => a - b); return Math.round(gaps[Math.floor(gaps.length * 0.95)])";
        let slowest = browser.script(slowest).parse::<u32>().unwrap();
        assert!(slowest < 250, "{slowest} ms");
    };
    // 300 MB, all of them one line.
    browser.script(FRAMES);
    browser.runs_to("sh -c 'head -c 300000000 /dev/zero | tr \"\\0\" x'", "running");
    wait_for("the end", || browser.state() == "exited");
    is_fluent();
    let length = browser.output().len();
    assert!((1_000_000..2_100_000).contains(&length), "{length}");
    assert!(browser.latest("article.textContent").contains("300.0 MB"));
    // Lines without an end, until Stop.
    browser.script(FRAMES);
    browser.run("yes 0123456789012345678901234567890123456789");
    let dropped = "article.querySelector('[data-part=dropped]').checkVisibility() && article.querySelector('[data-part=dropped]').textContent.replaceAll(',', '').match(/[0-9]+/)[0] > 1e6";
    wait_for("a million lines to be dropped", || browser.latest(dropped) == "true");
    let lines = browser.output().lines().count();
    assert!((4900..=5200).contains(&lines), "{lines}");
    // The line about it is in view, though the end is followed.
    let place = "[article.querySelector('[data-part=dropped]').getBoundingClientRect().top > 0, document.querySelector('main').scrollTop > 1000].join()";
    assert_eq!(browser.latest(place), "true,true");
    // Who scrolls up is left there.
    browser.script("document.querySelector('main').scrollTop -= 2000");
    wait_for("the way back", || {
        browser.script(&format!("return {} !== undefined", button("↓ Latest"))) == "true"
    });
    browser.press("↓ Latest");
    browser.press("Stop");
    browser.ends_as("stopped");
    is_fluent();
    wait_for("the command to end", || server.children().is_empty());
    // What is saved is the end of it, and says so.
    let (_, text) = browser.saved();
    assert!(text.starts_with("[Missing before this: "), "{}", &text[..100]);
    assert!((32_000_000..40_000_000).contains(&text.len()), "{}", text.len());
}

const TOKEN_IS_ASKED: &str = "return document.querySelector('label[for=token]').textContent === 'Token' && document.querySelector('#token').checkVisibility()";

#[test]
#[ignore = "needs chromium and chromedriver"]
fn browser_page_asks_for_a_token() {
    let folder = Folder::new();
    let file = folder.write("token", "s3cret");
    let (server, browser) = console(&["--token-file", &file, "--allow", "echo *"]);
    let focus = "return document.activeElement.id";
    let chips = "return document.querySelectorAll('#chips button').length";
    assert_eq!(browser.script(TOKEN_IS_ASKED), "false");
    browser.runs_to("echo hi", "not started");
    browser.until("the question", TOKEN_IS_ASKED);
    assert_eq!(browser.script(focus), "token");
    browser.keys("wrong\u{e007}");
    browser.until("the question again", "return document.activeElement.id === 'token'");
    browser.keys("s3cret\u{e007}");
    browser.ends_as("exited 0");
    assert_eq!(browser.output(), "hi\n");
    assert_eq!(browser.script(TOKEN_IS_ASKED), "false");
    assert_eq!(browser.script(focus), "command");
    wait_for("the list", || browser.script(chips) == "1");
    browser.runs_to("echo again", "exited 0");
    // It is kept for the tab.
    browser.go(&format!("http://{}/", server.address));
    browser.runs_to("echo kept", "exited 0");
    assert_eq!(browser.output(), "kept\n");
    assert!(!server.log().contains("s3cret"));
}

#[test]
#[ignore = "needs chromium and chromedriver"]
fn browser_page_offers_what_may_run() {
    let (_server, browser) =
        console(&["--allow", "echo one", "--allow", "echo two *", "--allow", "uptime"]);
    let chips = "return [...document.querySelectorAll('#chips button')].filter((each) => each.checkVisibility()).map((each) => each.textContent).join('; ')";
    wait_for("the list", || browser.script(chips) == "echo one; echo two *; uptime");
    // What is typed narrows them down.
    browser.type_in("ec");
    assert_eq!(browser.script(chips), "echo one; echo two *");
    browser.type_in("echo two three");
    assert_eq!(browser.script(chips), "echo two *");
    browser.type_in("");
    browser.script(&format!("{COMMAND}.dispatchEvent(new Event('input'))"));
    browser.press("echo one");
    assert_eq!(browser.script(&format!("return {COMMAND}.value")), "echo one");
    browser.press("Run");
    browser.ends_as("exited 0");
    assert_eq!(browser.output(), "one\n");
    browser.press("echo two *");
    browser.keys("words\u{e007}");
    browser.ends_as("exited 0");
    wait_for("the output", || browser.output() == "two words\n");
    browser.runs_to("rm x", "not started");
}

#[test]
#[ignore = "needs chromium, chromedriver and nginx"]
fn browser_page_works_below_a_proxy_s_path() {
    let folder = Folder::new();
    let address = free_address();
    let origin = format!("http://{address}");
    let server = Server::start(&["--allow-origin", &origin, "--allow", "echo *"]);
    let configuration = format!(
        "pid nginx.pid; error_log error.log; worker_processes 1; daemon off; events {{}}
        http {{ access_log off; client_body_temp_path b; proxy_temp_path p; fastcgi_temp_path f; uwsgi_temp_path u; scgi_temp_path s;
        server {{ listen {address}; location /hosts/one/ {{ proxy_pass http://{}/; proxy_http_version 1.1; proxy_set_header Connection ''; }} }} }}",
        server.address
    );
    let file = folder.write("nginx.conf", configuration);
    let mut nginx = Command::new("nginx")
        .args(["-p", folder.0.to_str().unwrap(), "-c", &file])
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    wait_for("nginx", || std::net::TcpStream::connect(&address).is_ok());
    let browser = Browser::open(&format!("{origin}/hosts/one/"));
    assert_eq!(browser.title(), format!("ready – {address}/hosts/one"));
    browser.until("the list", "return document.querySelectorAll('#chips button').length === 1");
    browser.runs_to("echo by nginx", "exited 0");
    assert_eq!(browser.output(), "by nginx\n");
    drop(browser);
    signal_process(nginx.id(), "TERM");
    nginx.wait().unwrap();
}

#[test]
#[ignore = "needs chromium and chromedriver"]
fn browser_page_fits_a_phone() {
    let (server, browser) = console(&[]);
    browser.resize(360, 740, true);
    browser.go(&format!("http://{}/", server.address));
    let is_still = |what: &str| {
        let places = "return ['#run', '#shell', '#unfold', '#recall', '[aria-label=Command]'].map((each) => Math.round(document.querySelector(each).getBoundingClientRect().top)).join()";
        (what.to_string(), browser.script(places))
    };
    let at_rest = is_still("");
    browser.tap(COMMAND);
    browser.keys("sleep 1000");
    browser.tap(&button("Run"));
    browser.is_in("running");
    assert_eq!(is_still("").1, at_rest.1);
    browser.tap(&button("Stop"));
    browser.is_in("stopped");
    assert_eq!(is_still("").1, at_rest.1);
    browser.tap("document.querySelector('input[role=switch]').parentElement");
    browser.tap(COMMAND);
    browser.keys("echo a b | wc -w");
    browser.tap(&button("Run"));
    wait_for("the output", || browser.output() == "2\n");
    browser.is_in("exited");
    browser.tap(&button("History"));
    browser.tap(&button("sleep 1000"));
    assert_eq!(browser.script(&format!("return {COMMAND}.value")), "sleep 1000");
    browser.tap(&button("Re-run"));
    wait_for("another entry", || browser.count() == 3);
    browser.is_in("exited");
    // Text in fields is not zoomed into; nothing is wider than the screen; what is to be tapped is large.
    let small = "return [...document.querySelectorAll('textarea, input')].some((each) => parseFloat(getComputedStyle(each).fontSize) < 16 && each.type !== 'checkbox')";
    assert_eq!(browser.script(small), "false");
    let narrow = "return document.documentElement.scrollWidth <= 360";
    assert_eq!(browser.script(narrow), "true");
    let low = "return [...document.querySelectorAll('button, label')].filter((each) => each.checkVisibility() && each.getBoundingClientRect().height < 44).map((each) => each.textContent).join()";
    assert_eq!(browser.script(low), "");
}

#[test]
#[ignore = "needs chromium and chromedriver"]
fn browser_event_source_runs_a_command_once() {
    let folder = Folder::new();
    let file = folder.path("count");
    let (server, browser) = console(&[]);
    let listen = |browser: &Browser, address: &str, command: &str| {
        let url = format!("http://{address}{}", run_target(command));
        browser.script(&format!(
            "window.seen = []; const source = new EventSource('{url}'); for (const name of ['start', 'stdout', 'exit']) source.addEventListener(name, (event) => window.seen.push(name)); source.onerror = () => window.seen.push('error' + source.readyState)"
        ));
    };
    listen(&browser, &server.address, &format!("sh -c 'echo x >> {file}; echo y'"));
    browser.until("the stream to be over", "return window.seen.at(-1) === 'error2'");
    assert_eq!(browser.script("return window.seen.join()"), "start,stdout,exit,error0,error2");
    std::thread::sleep(std::time::Duration::from_secs(10));
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "x\n");
    // A page of another origin: refused, unless it is allowed.
    let page = other_site("Hello");
    let origin = format!("http://{page}");
    browser.go(&format!("{origin}/"));
    let other = Server::start(&[]);
    let friendly = Server::start(&["--allow-origin", &origin]);
    listen(&browser, &other.address, &format!("touch {}", folder.path("foreign")));
    browser.until("the refusal", "return window.seen.join() === 'error2'");
    assert!(!folder.0.join("foreign").exists());
    listen(&browser, &friendly.address, "echo hi");
    browser
        .until("the friendly stream", "return window.seen.join().startsWith('start,stdout,exit')");
}

/// All the ways in which a page can make a browser send something, at each of the names by which the server could be reached.
const HOSTILE_PAGE: &str = r#"<!doctype html><title>hostile</title><body><script>
const tries = [];
function attack(url, query) {
  const at = (how) => url + '/run?command=' + encodeURIComponent(query + how);
  const add = (tag, attributes) => document.body.append(Object.assign(document.createElement(tag), attributes));
  const frame = (name) => { add('iframe', { name }); return name; };
  add('img', { src: at('img') });
  add('script', { src: at('script') });
  add('link', { rel: 'stylesheet', href: at('link') });
  add('link', { rel: 'prefetch', href: at('prefetch') });
  add('iframe', { src: at('frame') });
  add('video', { src: at('video') });
  add('object', { data: at('object') });
  add('iframe', { sandbox: 'allow-scripts allow-forms', srcdoc: `<script>fetch(${JSON.stringify(at('sandbox'))}, { mode: 'no-cors' }); new Image().src = ${JSON.stringify(at('sandboximg'))}</` + `script>` });
  for (const method of ['GET', 'POST'])
    for (const enctype of ['application/x-www-form-urlencoded', 'text/plain', 'multipart/form-data']) {
      const form = Object.assign(document.createElement('form'), { action: at('form' + method), method, enctype, target: frame('f' + Math.random()) });
      form.append(Object.assign(document.createElement('input'), { name: 'command', value: query + 'field' }));
      document.body.append(form);
      form.submit();
    }
  for (const mode of ['cors', 'no-cors', 'same-origin', 'navigate'])
    for (const method of ['GET', 'POST'])
      for (const credentials of ['omit', 'include'])
        try { tries.push(fetch(at('fetch' + mode), { mode, method, credentials, referrerPolicy: 'no-referrer' }).catch(() => 0)); } catch { }
  tries.push(fetch(at('header'), { headers: { 'Content-Type': 'application/json', 'Sec-Fetch-Site': 'none' }, method: 'POST', body: '{}' }).catch(() => 0));
  navigator.sendBeacon(at('beacon'), 'command=' + query + 'beacon');
  new EventSource(at('eventsource'));
  open(at('open'));
}
</script>"#;

#[test]
#[ignore = "needs chromium and chromedriver"]
fn browser_hostile_pages_run_nothing() {
    let folder = Folder::new();
    let file = folder.write("token", "s3cret");
    let (server, browser) = console(&[]);
    let guarded = Server::start(&["--token-file", &file]);
    let site = other_site(HOSTILE_PAGE);
    let port = |address: &str| address.rsplit(':').next().unwrap().to_string();
    let names =
        ["127.0.0.1", "localhost", "a.localhost", "0.0.0.0", "[::ffff:127.0.0.1]", "evil.test"];
    for page in
        [format!("http://evil.test:{}/", site.port()), format!("http://localhost:{}/", site.port())]
    {
        browser.go(&page);
        for target in [&server, &guarded] {
            for name in names {
                let url = format!("http://{name}:{}", port(&target.address));
                let command = format!("touch {}/hit-", folder.0.display());
                browser.script(&format!("attack('{url}', '{command}')"));
            }
        }
        std::thread::sleep(std::time::Duration::from_secs(4));
    }
    // Rebinding: a page that was loaded from the server itself by another name.
    browser.go(&format!("http://evil.test:{}/", port(&server.address)));
    browser.script(&format!("fetch('/run?command=' + encodeURIComponent('touch {}/hit-rebound'), {{ method: 'POST' }}).catch(() => 0)", folder.0.display()));
    for status in ["status=403", "status=421"] {
        server.logged(&["refuse", status]);
    }
    guarded.logged(&["refuse", "status=401"]);
    std::thread::sleep(std::time::Duration::from_secs(1));
    let hits: Vec<_> = std::fs::read_dir(&folder.0)
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .filter(|name| name != "token")
        .collect();
    assert!(hits.is_empty(), "{hits:?}");
    // The control: the server's own page may.
    browser.go(&format!("http://{}/", server.address));
    browser.script(&format!("fetch('/run', {{ method: 'POST', body: new URLSearchParams({{ command: 'touch {}/own' }}) }})", folder.0.display()));
    wait_for("the own page's file", || folder.0.join("own").exists());
}

/// What axe has to say of the page as it is, serious or worse.
fn findings(browser: &Browser) -> String {
    browser.script(
        "window.findings = null; \
         axe.run().then((result) => { window.findings = result.violations \
         .filter((each) => ['serious', 'critical'].includes(each.impact)) \
         .map((each) => each.id + ' ' + each.nodes.map((node) => node.target).join()).join('; ') + '.'; })",
    );
    browser.until("axe", "return window.findings !== null");
    browser.script("return window.findings")
}

#[test]
#[ignore = "needs chromium, chromedriver and axe-core"]
fn browser_page_is_accessible() {
    let axe = format!("{}/node_modules/axe-core/axe.min.js", libraries());
    let axe = std::fs::read_to_string(axe).unwrap();
    let folder = Folder::new();
    let token = folder.write("token", "s3cret");
    let (server, browser) = console(&[]);
    let guarded = Server::start(&["--token-file", &token]);
    let listed = Server::start(&["--allow", "echo one", "--allow", "echo *"]);
    for (width, scheme) in [320, 768, 1280].into_iter().flat_map(|it| [(it, "light"), (it, "dark")])
    {
        browser.prefers(scheme);
        browser.resize(width, 740, false);
        browser.go(&format!("http://{}/", server.address));
        browser.script(&axe);
        let is_dark = "return matchMedia('(prefers-color-scheme: dark)').matches";
        assert_eq!(browser.script(is_dark), (scheme == "dark").to_string());
        let is_good = |what: &str| {
            assert_eq!(findings(&browser), ".", "{what}, {width} {scheme}");
            let overflow = "return document.documentElement.scrollWidth > innerWidth";
            assert_eq!(browser.script(overflow), "false", "{what}, {width}");
        };
        is_good("at rest");
        browser.runs_to(
            "sh -c 'echo out; echo err >&2; for n in 0 1 2 3 4 5 6 7; do printf \"\\033[3${n}m a \\033[9${n}m b \\033[0;4${n}m c \\033[0m\\n\"; done; exit 3'",
            "exited 3",
        );
        browser.runs_to("sh -c 'kill -9 $$'", "killed by signal 9");
        browser.runs_to("true", "exited 0");
        browser.runs_to("nonesuch", "not started");
        browser.run("sleep 1000");
        browser.is_in("running");
        browser.press("Input");
        browser.type_in("ls | wc");
        is_good("while a command runs");
        browser.press("Stop");
        browser.is_in("stopped");
        browser.press("History");
        is_good("with the history open");
        browser.go(&format!("http://{}/", guarded.address));
        browser.run("true");
        browser.until("the question for the token", TOKEN_IS_ASKED);
        browser.script(&axe);
        is_good("with a token");
        browser.go(&format!("http://{}/", listed.address));
        browser.until("the list", "return document.querySelectorAll('#chips button').length === 2");
        browser.script(&axe);
        is_good("with a list");
        // A control: what it is there to find is found.
        browser.script("document.querySelector('[role=log]').innerHTML = '<img src=x>'");
        assert!(findings(&browser).starts_with("image-alt"), "{width} {scheme}");
    }
}
