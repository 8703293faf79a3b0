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

    /// Types into the focused element; `\u{e007}` is Enter, `\u{e013}` and `\u{e015}` the arrows.
    fn keys(&self, text: &str) {
        let actions: Vec<_> = text
            .chars()
            .flat_map(|key| {
                ["keyDown", "keyUp"].map(|kind| {
                    format!("{{\"type\":\"{kind}\",\"value\":{}}}", json(&key.to_string()))
                })
            })
            .collect();
        self.post(
            "actions",
            &format!(
                "{{\"actions\":[{{\"type\":\"key\",\"id\":\"k\",\"actions\":[{}]}}]}}",
                actions.join(",")
            ),
        );
    }

    fn run(&self, command: &str) {
        self.script("document.querySelector('[aria-label=Command]').value = ''; document.querySelector('[aria-label=Command]').focus()");
        self.keys(&format!("{command}\u{e007}"));
    }

    fn status(&self) -> String {
        self.script("return document.querySelector('[role=status]').textContent")
    }

    fn output(&self) -> String {
        self.script("return document.querySelector('[role=log][aria-label=Output]').textContent")
    }

    fn press(&self, button: &str) {
        self.script(&format!("[...document.querySelectorAll('button')].find((each) => each.textContent === '{button}').click()"));
    }

    fn ends_as(&self, status: &str) {
        self.until(
            &format!("the status {status}"),
            &format!("return document.querySelector('[role=status]').textContent === '{status}'"),
        );
    }
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
    browser.run("sh -c 'echo out; echo err >&2; exit 3'");
    browser.ends_as("exited 3");
    assert!(
        browser.script("return document.querySelector('[role=status]').className").contains("bad")
    );
    assert_eq!(browser.script("return [...document.querySelectorAll('[data-stream=stderr]')].map((each) => each.textContent).join('')"), "err");
    assert!(browser.output().contains("out\n") && browser.output().contains("err\n"));
    browser.run("sh -c 'kill -9 $$'");
    browser.ends_as("killed by signal 9");
    assert_eq!(browser.output(), "");
    browser.run("nonesuch");
    browser.until("the failure", "return document.querySelector('[role=status]').textContent.startsWith('failed: cannot run nonesuch')");
    browser.run("'open");
    browser.until("the refusal", "return document.querySelector('[role=status]').textContent.includes('unclosed single quote')");
    // Live: the command waits for a file that is made once its output is there.
    let folder = Folder::new();
    browser.run(&format!(
        "sh -c 'echo live; until [ -e {} ]; do sleep 0.02; done; echo over'",
        folder.path("gate")
    ));
    browser.until(
        "live output",
        "return document.querySelector('[role=log]').textContent.startsWith('live')",
    );
    assert!(browser.status().starts_with("running "), "{}", browser.status());
    folder.write("gate", "");
    browser.ends_as("exited 0");
    assert_eq!(browser.output(), "live\nover\n");
    // Most recent first, without doubles; a draft is kept.
    browser.run("echo one");
    browser.ends_as("exited 0");
    browser.run("nonesuch");
    browser.until(
        "the failure",
        "return document.querySelector('[role=status]').textContent.startsWith('failed')",
    );
    browser.script("document.querySelector('[aria-label=Command]').value = 'draft'; document.querySelector('[aria-label=Command]').focus()");
    let field = "return document.querySelector('[aria-label=Command]').value";
    browser.keys("\u{e013}");
    assert_eq!(browser.script(field), "nonesuch");
    browser.keys("\u{e013}");
    assert_eq!(browser.script(field), "echo one");
    browser.keys("\u{e015}\u{e015}");
    assert_eq!(browser.script(field), "draft");
    // A link fills the field in, and runs nothing.
    let runs = server.log().matches(" run ").count();
    browser.go("about:blank");
    browser.go(&format!("http://{}/#touch%20{}", server.address, folder.path("linked")));
    assert_eq!(browser.script(field), format!("touch {}", folder.path("linked")));
    assert_eq!(server.log().matches(" run ").count(), runs);
}

#[test]
#[ignore = "needs chromium and chromedriver"]
fn browser_page_ends_commands() {
    let (mut server, browser) = console(&[]);
    let begin = |number: usize| {
        browser.run("sleep 1000");
        wait_for("the command", || {
            server.log().matches("command=\"sleep 1000\"").count() == number
        });
        *server.children().last().unwrap()
    };
    let pid = begin(1);
    browser.press("Stop");
    browser.ends_as("stopped");
    is_gone(pid);
    let pid = begin(2);
    browser.go("about:blank");
    is_gone(pid);
    browser.go(&format!("http://{}/", server.address));
    let orphan = begin(3);
    server.process.kill().unwrap();
    server.process.wait().unwrap();
    signal_process(orphan, "KILL");
    browser.until(
        "the loss",
        "return document.querySelector('[role=status]').textContent.startsWith('connection lost')",
    );
}

#[test]
#[ignore = "needs chromium and chromedriver"]
fn browser_page_shows_output_as_a_terminal_does() {
    let (_server, browser) = console(&[]);
    browser.run("printf '<img src=x onerror=document.title=1><b>'");
    browser.ends_as("exited 0");
    assert_eq!(browser.output(), "<img src=x onerror=document.title=1><b>");
    assert_eq!(browser.script("return document.querySelectorAll('[role=log] img, [role=log] b').length + document.title"), "0SSECommander");
    browser.run("printf 'a\\033[31mred\\033[0m\\033[2J\\033]0;title\\007b\\033[1;38;5;196mc'");
    browser.ends_as("exited 0");
    assert_eq!(browser.output(), "aredbc");
    let colour = "return getComputedStyle([...document.querySelectorAll('[role=log] span span')].find((each) => each.textContent === 'red')).color !== getComputedStyle(document.body).color";
    assert_eq!(browser.script(colour), "true");
    browser.run("printf '10%%\\r100%%\\nab\\bc\\tx\\nlong\\rs\\033[K!'");
    browser.ends_as("exited 0");
    assert_eq!(browser.output(), "100%\nac      x\ns!");
    // An escape that comes in two pieces.
    browser.run("sh -c 'printf \"x\\033[3\"; sleep 0.3; printf \"1my\"'");
    browser.ends_as("exited 0");
    assert_eq!(browser.output(), "xy");
}

#[test]
#[ignore = "needs chromium and chromedriver"]
fn browser_page_survives_a_flood() {
    let (server, browser) = console(&[]);
    browser.run("yes 0123456789012345678901234567890123456789");
    browser.until("lines to be dropped", "return !document.querySelector('#dropped').hidden");
    for _ in 0..20 {
        let kept = browser.script("const text = document.querySelector('[role=log]').textContent; return text.length < 2.2e6 && text.split('\\n').length < 5100");
        assert_eq!(kept, "true");
    }
    browser.press("Stop");
    browser.ends_as("stopped");
    wait_for("the command to end", || server.children().is_empty());
}

#[test]
#[ignore = "needs chromium and chromedriver"]
fn browser_page_asks_for_a_token() {
    let folder = Folder::new();
    let file = folder.write("token", "s3cret");
    let (server, browser) = console(&["--token-file", &file]);
    let hidden = "return document.querySelector('label[for=token]').textContent + document.querySelector('#credentials').hidden";
    assert_eq!(browser.script(hidden), "Tokentrue");
    browser.run("echo hi");
    browser.ends_as("a token is needed");
    assert_eq!(browser.script(hidden), "Tokenfalse");
    browser.keys("wrong\u{e007}");
    browser.ends_as("refused: the token is wrong");
    browser.keys("s3cret\u{e007}");
    browser.ends_as("exited 0");
    assert_eq!((browser.output().as_str(), browser.script(hidden).as_str()), ("hi\n", "Tokentrue"));
    browser.run("echo again");
    browser.until(
        "the second run",
        "return document.querySelector('[role=log]').textContent === 'again\\n'",
    );
    assert!(!server.log().contains("s3cret"));
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
    for (width, scheme) in [(1000, "light"), (1000, "dark"), (320, "light"), (320, "dark")] {
        let feature = format!("{{\"name\":\"prefers-color-scheme\",\"value\":\"{scheme}\"}}");
        let media = format!("{{\"features\":[{feature}]}}");
        let command = format!("{{\"cmd\":\"Emulation.setEmulatedMedia\",\"params\":{media}}}");
        browser.post("goog/cdp/execute", &command);
        let metrics = format!(
            "{{\"width\":{width},\"height\":640,\"deviceScaleFactor\":1,\"mobile\":false}}"
        );
        browser.post(
            "goog/cdp/execute",
            &format!("{{\"cmd\":\"Emulation.setDeviceMetricsOverride\",\"params\":{metrics}}}"),
        );
        browser.go(&format!("http://{}/", server.address));
        browser.script(&axe);
        let is_dark = "return matchMedia('(prefers-color-scheme: dark)').matches";
        assert_eq!(browser.script(is_dark), (scheme == "dark").to_string());
        assert_eq!(findings(&browser), ".", "at rest, {width} {scheme}");
        browser.run(
            "sh -c 'echo out; echo err >&2; printf \"\\033[31mred\\033[32mgreen\\n\"; exit 3'",
        );
        browser.ends_as("exited 3");
        assert_eq!(findings(&browser), ".", "with output, {width} {scheme}");
        let overflow = "return document.documentElement.scrollWidth > innerWidth";
        assert_eq!(browser.script(overflow), "false", "{width}");
        browser.go(&format!("http://{}/", guarded.address));
        browser.run("true");
        browser.until(
            "the question for the token",
            "return [...document.querySelectorAll('input')].some((each) => each.type === 'password' && each.checkVisibility())",
        );
        browser.script(&axe);
        assert_eq!(findings(&browser), ".", "with a token, {width} {scheme}");
        // A control: what it is there to find is found.
        browser.script("document.querySelector('[role=log]').innerHTML = '<img src=x>'");
        assert!(findings(&browser).starts_with("image-alt"), "{width} {scheme}");
    }
}
