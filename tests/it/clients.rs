//! Other people's clients and proxies, as they are installed.

use crate::requests::runs;
use crate::support::*;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// A program that runs until the test is over.
struct Running(Child, &'static str);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = Command::new("kill")
            .args(["-s", self.1, &self.0.id().to_string()])
            .stderr(Stdio::null())
            .status();
        let _ = self.0.wait();
    }
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// What a program prints, which gets a minute for it.
fn text_of(program: &str, arguments: &[&str]) -> String {
    let output = Command::new("timeout")
        .args(["60", program])
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    String::from_utf8(output.stdout).unwrap()
}

/// A proxy with this configuration, once it answers on `port`.
fn proxy(folder: &Folder, program: &str, configuration: &str, port: u16) -> Running {
    let file = folder.write("proxy.conf", configuration);
    let mut command = Command::new(program);
    match program {
        "nginx" => {
            command.args(["-p", folder.0.to_str().unwrap(), "-c", &file, "-g", "daemon off;"])
        }
        _ => command.args(["-f", &file, "-db"]),
    };
    // nginx takes its workers along; HAProxy would wait for its connections.
    let signal = if program == "nginx" { "TERM" } else { "KILL" };
    let running =
        Running(command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap(), signal);
    wait_for(program, || std::net::TcpStream::connect(("127.0.0.1", port)).is_ok());
    running
}

/// The examples of the README: what stands in fences, or is indented, with the other lines of its piece.
fn examples() -> Vec<String> {
    let (mut examples, mut example, mut is_fenced) = (Vec::new(), String::new(), false);
    for line in include_str!("../../README.md").lines() {
        let is_fence = line.starts_with("```");
        let part = match line.strip_prefix("    ") {
            _ if is_fence => None,
            _ if is_fenced => Some(line),
            part => part,
        };
        match part {
            Some(part) => example.push_str(&format!("{part}\n")),
            None => examples.push(std::mem::take(&mut example)),
        }
        is_fenced ^= is_fence;
    }
    examples.push(example);
    examples
}

/// The example of the README that has this line, from there on.
fn example(first: &str) -> String {
    let found = examples().into_iter().find_map(|example| {
        let place = example.lines().position(|line| line.trim_end() == first)?;
        let lines = example.lines().skip(place);
        Some(lines.map(|line| format!("{line}\n")).collect())
    });
    found.unwrap_or_else(|| panic!("the README has no {first:?}"))
}

/// A proxy's example, with `port` to listen on and `servers` instead of its own.
fn proxy_example(first: &str, port: u16, servers: &str) -> String {
    let example = example(first);
    let example = example.replace("listen 8080", &format!("listen 127.0.0.1:{port}"));
    let example = example.replace("bind :8080", &format!("bind 127.0.0.1:{port}"));
    let is_server =
        |line: &str| line.trim_start().starts_with("server ") && line.contains("127.0.0.1:300");
    let place = example.lines().position(is_server);
    let place = place.unwrap_or_else(|| panic!("no server in {example}"));
    let others: Vec<&str> = example.lines().filter(|line| !is_server(line)).collect();
    [&others[..place], &[servers], &others[place..], &[""]].concat().join("\n")
}

/// nginx with what stands in `http`.
fn nginx(folder: &Folder, port: u16, http: &str) -> Running {
    let configuration = format!(
        "pid nginx.pid; error_log error.log; worker_processes 1; events {{}}
        http {{ access_log off; client_body_temp_path body; proxy_temp_path proxy; fastcgi_temp_path f; uwsgi_temp_path u; scgi_temp_path s;
        {http} }}"
    );
    proxy(folder, "nginx", &configuration, port)
}

fn shown_nginx(folder: &Folder, port: u16, servers: &[&Server]) -> Running {
    let lines = servers.iter().map(|server| format!("server {} max_fails=0;", server.address));
    let servers = lines.collect::<String>();
    nginx(folder, port, &proxy_example("upstream commander {", port, &servers))
}

fn shown_haproxy(folder: &Folder, port: u16, servers: &[&Server]) -> Running {
    let lines = servers.iter().enumerate();
    let lines = lines.map(|(number, server)| format!("server s{number} {}\n", server.address));
    let servers = lines.collect::<String>();
    proxy(folder, "haproxy", &proxy_example("defaults", port, &servers), port)
}

/// Through `address`, events come one by one, and a client that leaves ends its command.
fn streams_and_ends(server: &Server, address: &str, fields: &[&str]) {
    let folder = Folder::new();
    let gate = folder.path("gate");
    let command = format!(
        "sh -c 'echo first; until [ -e {gate} ]; do sleep 0.02; done; echo second; exec sleep 1000'"
    );
    let mut curl = Command::new("curl");
    let url = format!("http://{address}{}", run_target(&command));
    curl.args(["-sN", "--max-time", "60", &url]);
    fields.iter().for_each(|field| _ = curl.args(["-H", field]));
    let mut curl = curl.stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(curl.stdout.take().unwrap()).lines();
    let mut read_to = |text: &str| lines.any(|line| line.unwrap().contains(text));
    assert!(read_to("first"));
    folder.write("gate", "");
    assert!(read_to("second"));
    let children = server.children();
    assert_eq!(children.len(), 1);
    curl.kill().unwrap();
    curl.wait().unwrap();
    is_gone(children[0]);
}

/// Through `address`, where every other instance is full, each client is served all the same.
fn fails_over(address: &str) {
    for _ in 0..4 {
        let events = text_of("curl", &["-sN", &format!("http://{address}/run?command=echo+hi")]);
        assert_eq!(output(&parse_events(events.as_bytes()), "stdout"), "hi\n");
    }
}

/// Through `address`, whose pages are admitted, a page's request is answered, content reaches the
/// command, and plain text arrives.
fn serves_pages_and_content(address: &str, feeds: &[&str]) {
    let url = |command: &str| format!("http://{address}{}", run_target(command));
    let own = format!("Origin: http://{address}");
    let events = text_of("curl", &["-sN", "-H", &own, &url("echo hi")]);
    assert_eq!(output(&parse_events(events.as_bytes()), "stdout"), "hi\n");
    let refused = text_of("curl", &["-sN", "-H", "Origin: http://evil.test", &url("echo hi")]);
    assert!(refused.contains("--allow-origin"), "{refused}");
    // A length is what the server asks for; a proxy that buffers gives it one.
    for feed in feeds {
        let fed = format!("seq 1000 | curl -sN {feed} -H 'Accept: text/plain' '{}'", url("wc -l"));
        assert_eq!(text_of("sh", &["-c", &fed]), "1000\n", "{feed}");
    }
}

#[test]
#[ignore = "needs curl"]
fn clients_curl() {
    let server = Server::start(&["--heartbeat", "2"]);
    let url = format!("http://{}/run", server.address);
    let curl = |arguments: &[&str]| text_of("curl", &[&["-sN"], arguments].concat());
    let with_command =
        |command: &str| format!("{url}?command={}", percent_encode(command.as_bytes()));
    for form in [&["--data-urlencode"][..], &["-G", "--data-urlencode"]] {
        let arguments = [form, &["command=sh -c 'echo \"a&b\" | cat; exit 3'", &url]].concat();
        let events = parse_events(curl(&arguments).as_bytes());
        assert_eq!(output(&events, "stdout"), "a&b\n");
        assert_eq!(outcome(&events), "exited:3");
    }
    // What curl's users try first is run whole or not at all.
    for arguments in [
        &["-d", "command=echo a && echo b"][..],
        &["-d", "command=true&x=1"],
        &["-d", "ls -l"],
        &["-F", "command=true"],
        &["--json", "{\"command\": \"true\"}"],
        &["-H", "Content-Type: text/plain", "-d", "command=true"],
    ] {
        let before = runs(&server);
        let said = curl(&[arguments, &[&url]].concat());
        assert!(said.contains("--data-urlencode"), "{arguments:?}: {said}");
        assert_eq!(said.lines().count(), 1, "{said}");
        assert_eq!(runs(&server), before);
    }
    // Of a wrong way to give it input it says the right one.
    let feeds = |arguments: &str| {
        let url = with_command("wc -c");
        let line = format!("seq 100000 | curl -sN -H 'Accept: text/plain' {arguments} '{url}'");
        text_of("sh", &["-c", &line])
    };
    let said = feeds("-X POST -T -");
    assert!(said.contains("curl --data-binary @-"), "{said}");
    let said = feeds("-H 'Transfer-Encoding: chunked' --data-binary @-");
    assert!(said.contains("curl --data-binary @-"), "{said}");
    assert_eq!(feeds("--data-binary @-"), "588895\n");
    let folder = Folder::new();
    let large = folder.write("large", vec![b'x'; 3 << 20]);
    let said = curl(&["-T", &large, &with_command("wc -c")]);
    assert!(said.contains("POST"), "{said}");
    // Over 1 MiB curl expects 100 Continue.
    let large = format!("@{large}");
    let plain = ["-H", "Accept: text/plain"];
    let fed = ["--data-binary", &large, &with_command("wc -c")];
    assert_eq!(curl(&[&plain[..], &fed].concat()), "3145728\n");
    let fed = ["--data-binary", &large, &with_command("nonesuch")];
    let said = curl(&[&plain[..], &fed].concat());
    assert!(said.contains("nonesuch") && !said.contains("os error"));
    // The outcome comes behind the output.
    let said = curl(&["-D", "-", plain[0], plain[1], &with_command("sh -c 'echo a; exit 3'")]);
    assert!(said.contains("\r\n\r\na\n") && said.ends_with("Exit-Code: 3\r\n"), "{said}");
    streams_and_ends(&server, &server.address, &[]);
}

/// Ctrl-C, while what nobody reads is still being sent.
#[test]
#[ignore = "needs curl"]
fn clients_curl_with_unread_content() {
    let server = Server::start(&["--heartbeat", "2"]);
    let folder = Folder::new();
    let large = folder.write("large", "");
    let file = std::fs::File::options().write(true).open(&large).unwrap();
    file.set_len(100 << 20).unwrap();
    let url = format!("http://{}/run?command=sleep+1000", server.address);
    for accept in ["text/plain", "text/event-stream"] {
        let mut curl = Command::new("curl");
        curl.args(["-sN", "-H", &format!("Accept: {accept}")]);
        curl.args(["--data-binary", &format!("@{large}"), &url]);
        let curl = Running(curl.stdout(Stdio::null()).spawn().unwrap(), "KILL");
        wait_for("the command", || server.children().len() == 1);
        let command = server.children()[0];
        // It sends until nothing more is taken: what is under way no longer changes.
        let mut before = String::new();
        wait_for("the flood to stand still", || {
            let now = std::fs::read_to_string(format!("/proc/{}/io", curl.0.id())).unwrap();
            let is_still = now == before;
            before = now;
            std::thread::sleep(Duration::from_millis(300));
            is_still
        });
        signal_process(curl.0.id(), "INT");
        is_gone(command);
        wait_for("it to be reaped", || server.children().is_empty());
    }
}

/// A relay that cuts the first answer off in its middle, and lets all later ones through.
fn cutting_relay(server: &str) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let server = server.to_string();
    std::thread::spawn(move || {
        for (number, client) in listener.incoming().map_while(Result::ok).enumerate() {
            let upstream = TcpStream::connect(&server).unwrap();
            let (mut from, mut to) = (upstream.try_clone().unwrap(), client.try_clone().unwrap());
            let (mut asked, mut asks) = (client, upstream);
            std::thread::spawn(move || {
                let _ = std::io::copy(&mut asked, &mut asks);
            });
            let mut answer = Vec::<u8>::new();
            let mut piece = [0; 4096];
            while let Ok(read @ 1..) = from.read(&mut piece) {
                answer.extend(&piece[..read]);
                if to.write_all(&piece[..read]).is_err() {
                    break;
                }
                if number == 0 && answer.windows(5).any(|seen| seen == b"first") {
                    break;
                }
            }
            let _ = to.shutdown(std::net::Shutdown::Both);
            let _ = from.shutdown(std::net::Shutdown::Both);
        }
    });
    address
}

#[test]
#[ignore = "needs wget"]
fn clients_wget() {
    let server = Server::start(&[]);
    let wget = |arguments: &[&str]| text_of("wget", &[&["-qO-", "--tries=1"], arguments].concat());
    let url = format!("http://{}/run", server.address);
    let events = wget(&[&format!("{url}?command=echo+hi")]);
    assert_eq!(output(&parse_events(events.as_bytes()), "stdout"), "hi\n");
    let form = wget(&["--header=Accept: text/plain", "--post-data=command=echo+hi", &url]);
    assert_eq!(form, "hi\n");
    let before = runs(&server);
    // After an answer that was cut off it asks for the rest, and would glue a second run's output to the
    // first.
    for accept in ["*/*", "text/plain"] {
        let relay = cutting_relay(&server.address);
        let target = run_target("sh -c 'echo first; sleep 0.5; echo second'");
        let said = text_of(
            "wget",
            &[
                "-qO-",
                "--tries=5",
                "--waitretry=1",
                &format!("--header=Accept: {accept}"),
                &format!("http://{relay}{target}"),
            ],
        );
        assert_eq!(said.matches("first").count(), 1, "{accept}: {said}");
    }
    assert_eq!(runs(&server), before + 2);
}

#[test]
#[ignore = "needs busybox and nc"]
fn clients_busybox_and_nc() {
    let server = Server::start(&[]);
    let url = format!("http://{}/run?command=echo+hi", server.address);
    let events = text_of("busybox", &["wget", "-q", "-O", "-", &url]);
    assert_eq!(output(&parse_events(events.as_bytes()), "stdout"), "hi\n");
    // It closes its side of the connection once its input has ended.
    let (host, port) = server.address.split_once(':').unwrap();
    let late = "GET /run?command=sh+-c+'sleep+0.5;+echo+late' HTTP/1.0\r\n\r\n";
    let mut nc = Command::new("nc")
        .args(["-N", host, port])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    nc.stdin.take().unwrap().write_all(late.as_bytes()).unwrap();
    let answer = nc.wait_with_output().unwrap().stdout;
    let answer = String::from_utf8(answer).unwrap();
    let (_, events) = answer.split_once("\r\n\r\n").unwrap();
    let events = parse_events(events.as_bytes());
    assert_eq!(output(&events, "stdout"), "late\n");
    assert_eq!(outcome(&events), "exited:0");
}

#[test]
#[ignore = "needs nginx and curl"]
fn clients_behind_nginx() {
    let (folder, port) = (Folder::new(), free_port());
    let address = format!("127.0.0.1:{port}");
    // As it comes, nginx sends its upstream's name as Host, which rule 1 refuses where that is a name,
    // unless there is a token.
    let token = folder.write("token", "s3cret\n");
    let with_token = Server::start(&["--token-file", &token]);
    let plain = format!(
        "server {{ listen 127.0.0.1:{port}; location / {{ proxy_pass http://{}; }} }}",
        with_token.address
    );
    let plain = nginx(&folder, port, &plain);
    streams_and_ends(&with_token, &address, &["Authorization: Bearer s3cret"]);
    drop(plain);
    let port = free_port();
    let address = format!("127.0.0.1:{port}");
    let options = ["--allow-origin", &format!("http://{address}"), "--max-commands", "1"];
    let (full, server) = (Server::start(&options), Server::start(&options[..2]));
    let proxy = shown_nginx(&folder, port, &[&server]);
    streams_and_ends(&server, &address, &[]);
    serves_pages_and_content(&address, &["--data-binary @-", "-X POST -T -"]);
    drop(proxy);
    // A POST that one has refused it does not bring to another, unless it is told that it may.
    let (_held, _) = full.begin("sleep 1000");
    let port = free_port();
    let address = format!("127.0.0.1:{port}");
    let _proxy = shown_nginx(&folder, port, &[&full, &server]);
    fails_over(&address);
}

#[test]
#[ignore = "needs haproxy and curl"]
fn clients_behind_haproxy() {
    let (folder, port) = (Folder::new(), free_port());
    // As it comes, HAProxy passes Host through and streams, but does not notice a client that leaves.
    let server = Server::start(&[]);
    let plain = format!(
        "defaults\n mode http\n timeout connect 5s\n timeout client 1h\n timeout server 1h\nlisten l\n bind 127.0.0.1:{port}\n server s {}\n",
        server.address
    );
    let plain = proxy(&folder, "haproxy", &plain, port);
    let target = run_target("sh -c 'echo hi; exit 3'");
    let url = format!("http://127.0.0.1:{port}{target}");
    let events = parse_events(text_of("curl", &["-sN", &url]).as_bytes());
    assert_eq!(output(&events, "stdout"), "hi\n");
    assert_eq!(outcome(&events), "exited:3");
    drop(plain);
    let port = free_port();
    let address = format!("127.0.0.1:{port}");
    let options = ["--allow-origin", &format!("http://{address}"), "--max-commands", "1"];
    let (full, server) = (Server::start(&options), Server::start(&options[..2]));
    let (_held, _) = full.begin("sleep 1000");
    let _proxy = shown_haproxy(&folder, port, &[&full, &server]);
    streams_and_ends(&server, &address, &[]);
    serves_pages_and_content(&address, &["--data-binary @-"]);
    fails_over(&address);
}

/// The pages that a proxy serves have its own origin: what admits them stands in the line that starts
/// the server.
#[test]
#[ignore = "needs the README's examples"]
fn clients_are_shown_how_a_proxy_s_pages_are_admitted() {
    let admits = |line: &str| line.contains("ssecommander ") && line.contains("--allow-origin");
    assert!(examples().iter().any(|example| example.lines().any(admits)));
}

/// The README's function passes words and statuses on as a local command would, here and behind its HAProxy.
#[test]
#[ignore = "needs curl and haproxy"]
fn clients_remote_function_of_the_readme() {
    let function = example("remote() {");
    let end = function.find("\n}\n").unwrap() + 3;
    let function = &function[..end];
    let (server, folder, port) = (Server::start(&[]), Folder::new(), free_port());
    let _proxy = shown_haproxy(&folder, port, &[&server]);
    let own = "http://127.0.0.1:3000";
    assert!(function.contains(own), "{function}");
    for address in [&server.address, &format!("127.0.0.1:{port}")] {
        let function = function.replace(own, &format!("http://{address}"));
        for (line, expected) in [
            ("remote true", "0"),
            ("remote sh -c 'echo hello; exit 3'", "hello\n3"),
            (
                "remote printf '[%s]' 'a  b' \"c'd\" 'e\"f' '$HOME' 'g\\h' '' '*'",
                "[a  b][c'd][e\"f][$HOME][g\\h][][*]0",
            ),
            ("remote printf '%s' 'a&b=c+d%20e'", "a&b=c+d%20e0"),
            ("remote printf '[%s]' 'two\nlines'", "[two\nlines]0"),
            ("remote sh -c 'kill -TERM $$'", "143"),
            ("remote nonesuch 2>&1 | grep -c nonesuch; remote nonesuch >/dev/null 2>&1", "1\n127"),
        ] {
            let script = format!("{function}\n{line}\nprintf %s \"$?\"");
            let said = text_of("sh", &["-c", &script]);
            assert_eq!(said, expected, "{address}: {line}");
        }
    }
    // Nobody there.
    let nobody = function.replace(own, &format!("http://127.0.0.1:{}", free_port()));
    let script = format!("{nobody}\nremote true\nprintf %s \"$?\"");
    assert_eq!(text_of("sh", &["-c", &script]), "255");
}

/// What a library's client says that it saw, one event name a line. Those that end by themselves go on
/// waiting, as the others do.
const PYTHON: &str = r#"
import asyncio, json, sys, time
kind, url = sys.argv[1:]
def see(event, data):
    print(event, json.loads(data).get("out", "").strip(), flush=True)
if kind == "httpx-sse":
    import httpx
    from httpx_sse import connect_sse
    with httpx.Client() as client, connect_sse(client, "GET", url) as source:
        for event in source.iter_sse(): see(event.event, event.data)
if kind == "requests":
    import requests
    event = ""
    for line in requests.get(url, stream=True).iter_lines(decode_unicode=True):
        if line.startswith("event: "): event = line[7:]
        if line.startswith("data: "): see(event, line[6:])
if kind == "sseclient-py":
    import requests, sseclient
    for event in sseclient.SSEClient(requests.get(url, stream=True)).events(): see(event.event, event.data)
if kind == "sseclient":
    from sseclient import SSEClient
    for event in SSEClient(url, retry=1000): see(event.event, event.data)
if kind == "aiohttp-sse-client":
    import datetime
    from aiohttp_sse_client import client
    async def all():
        async with client.EventSource(url, reconnection_time=datetime.timedelta(seconds=0.5)) as source:
            async for event in source: see(event.type, event.data)
    asyncio.run(all())
print("ended", flush=True)
time.sleep(1000)
"#;

const NODE: &str = r#"
const [kind, url] = process.argv.slice(2);
const see = (event, data) => console.log(event, (JSON.parse(data).out ?? '').trim());
const watch = (source) => {
  for (const name of ['start', 'stdout', 'exit']) source.addEventListener(name, (event) => see(name, event.data));
};
if (kind === 'eventsource-parser') {
  const { createParser } = await import('eventsource-parser');
  const parser = createParser({ onEvent: (event) => see(event.event, event.data) });
  for await (const part of (await fetch(url)).body.pipeThrough(new TextDecoderStream())) parser.feed(part);
}
if (kind === 'eventsource' || kind === 'undici') watch(new (await import(kind)).EventSource(url));
if (kind === 'event-source-polyfill') watch(new (await import(kind)).default.EventSourcePolyfill(url));
if (kind === 'reconnecting-eventsource') {
  const { EventSource } = await import('eventsource');
  const { default: Reconnecting } = await import(kind);
  watch(new Reconnecting(url, { eventSourceClass: EventSource, max_retry_time: 1000 }));
}
setInterval(() => {}, 1000);
"#;

/// Each streams, and none runs its command again within ten seconds of its `exit`, though most of them
/// ask for it.
#[test]
#[ignore = "needs the libraries"]
fn clients_that_reconnect_run_nothing_twice() {
    let server = Server::start(&[]);
    let folder = Folder::new();
    let python = folder.write("client.py", PYTHON);
    // Node looks for packages beside the script.
    let node = format!("{}/client.mjs", libraries());
    std::fs::write(&node, NODE).unwrap();
    let start = |program: &str, script: &str, kind: &str| {
        let target = run_target(&format!("echo {kind}"));
        let mut command = Command::new(program);
        command.args([script, kind, &format!("http://{}{target}", server.address)]);
        // Two packages have the same module's name; the one that stands apart goes first for itself.
        if kind == "sseclient" {
            command.env("PYTHONPATH", format!("{}/sseclient", libraries()));
        }
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let seen = Arc::new(Mutex::new(Vec::new()));
        let sink = seen.clone();
        std::thread::spawn(move || {
            lines.map_while(Result::ok).for_each(|line| sink.lock().unwrap().push(line));
        });
        (kind.to_string(), Running(child, "KILL"), seen)
    };
    let with_python = format!("{}/bin/python", libraries());
    let mut clients = Vec::new();
    for kind in ["httpx-sse", "requests", "sseclient-py", "sseclient", "aiohttp-sse-client"] {
        clients.push(start(&with_python, &python, kind));
    }
    for kind in [
        "eventsource-parser",
        "eventsource",
        "undici",
        "event-source-polyfill",
        "reconnecting-eventsource",
    ] {
        clients.push(start("node", &node, kind));
    }
    for (kind, _, seen) in &clients {
        wait_for(&format!("{kind} to see the end"), || seen.lock().unwrap().len() >= 3);
        let seen = seen.lock().unwrap()[..3].to_vec();
        let stdout = format!("stdout {kind}");
        assert_eq!(seen, ["start ", &stdout, "exit exited"]);
    }
    std::thread::sleep(Duration::from_secs(10));
    let log = server.log();
    for (kind, ..) in &clients {
        let line = format!(" command=\"echo {kind}\"");
        let ran = log.lines().filter(|log| log.contains("Z run ") && log.ends_with(&line));
        assert_eq!(ran.count(), 1, "{kind}\n{log}");
    }
}

#[test]
#[ignore = "needs curl, nginx and haproxy"]
fn clients_of_four_instances() {
    let servers = [(); 4].map(|()| Server::start(&["--max-commands", "2"]));
    // Each of many: the command that README shows.
    let addresses = servers.each_ref().map(|server| server.address.as_str());
    let script = format!(
        "printf '%s\\n' {} | xargs -P 8 -I '{{}}' curl -sN -H 'Accept: text/plain' 'http://{{}}/run?command=echo+{{}}'",
        addresses.join(" ")
    );
    let answers = text_of("sh", &["-c", &script]);
    let (mut answers, mut expected) = (answers.lines().collect::<Vec<_>>(), addresses);
    answers.sort_unstable();
    expected.sort_unstable();
    assert_eq!(answers, expected);
    // Interchangeable ones: eight streams at once fill all four, through either proxy.
    let folder = Folder::new();
    let (nginx_port, haproxy_port) = (free_port(), free_port());
    let _nginx = shown_nginx(&folder, nginx_port, &servers.each_ref());
    let other = Folder::new();
    let _haproxy = shown_haproxy(&other, haproxy_port, &servers.each_ref());
    for port in [nginx_port, haproxy_port] {
        let url = format!("http://127.0.0.1:{port}/run?command=sleep+1000");
        let clients: Vec<_> = (0..8)
            .map(|_| {
                let mut curl = Command::new("curl");
                curl.args(["-sN", &url]).stdout(Stdio::null());
                Running(curl.spawn().unwrap(), "KILL")
            })
            .collect();
        for server in &servers {
            wait_for("two streams", || server.children().len() == 2);
        }
        drop(clients);
        for server in &servers {
            wait_for("no stream", || server.children().is_empty());
        }
    }
}

#[test]
#[ignore = "needs slowhttptest"]
fn clients_that_are_slow_do_not_keep_out_a_good_one() {
    let server = Server::start(&["--stall", "3"]);
    let rest = server.at_rest();
    // A browser by its User-Agent, it needs another field to be heard, which it offers no way to send
    // but behind a cookie.
    let own_page = "a=b\r\nSec-Fetch-Site: none";
    // Slow heads, slow forms, slow reading of the page, over and over.
    let modes: [(&str, &[&str]); 3] = [
        ("/", &["-H"]),
        ("/run", &["-B", "-s", "60000", "-j", own_page]),
        ("/", &["-X", "-z", "32", "-w", "10", "-y", "20", "-n", "2", "-k", "10"]),
    ];
    for (target, mode) in modes {
        let url = format!("http://{}{target}", server.address);
        let mut attack = Command::new("slowhttptest");
        attack.args(mode);
        attack.args(["-c", "100", "-r", "100", "-i", "1", "-l", "60", "-u", &url]);
        let attack = attack.stdout(Stdio::null()).stderr(Stdio::null()).spawn();
        let _attack = Running(attack.unwrap(), "KILL");
        wait_for("the attack", || server.threads() > 50);
        // A good client is served all the while, until the last of them has been given up.
        let mut served = 0;
        wait_for("the attackers to be given up", || {
            assert_eq!(outcome(&server.run("true")), "exited:0", "{mode:?}");
            served += 1;
            server.threads() < 5
        });
        assert!(served > 20, "{mode:?}: {served}");
    }
    server.comes_to_rest(rest);
}
