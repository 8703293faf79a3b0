//! Other people's clients and proxies, as they are installed.

use crate::support::*;
use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::process::{Child, Command, Stdio};

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

fn text_of(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).stdin(Stdio::null()).output().unwrap();
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

/// The example of the README that begins with this line, with `port` to listen on and `servers` instead of its own two.
fn shown(first: &str, port: u16, servers: &str) -> String {
    let lines = include_str!("../../README.md").lines();
    let lines = lines.skip_while(|line| line.strip_prefix("    ") != Some(first));
    let example = lines.take_while(|line| line.starts_with("    "));
    let example: String = example.map(|line| format!("{}\n", &line[4..])).collect();
    let example = example.replace("listen 8080", &format!("listen 127.0.0.1:{port}"));
    let example = example.replace("bind :8080", &format!("bind 127.0.0.1:{port}"));
    let is_server =
        |line: &str| line.trim_start().starts_with("server ") && line.contains("127.0.0.1:300");
    let (own, others): (Vec<&str>, Vec<&str>) = example.lines().partition(|line| is_server(line));
    assert_eq!(own.len(), 2, "{example}");
    let place = example.lines().position(is_server).unwrap();
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
    let lines = servers.iter().map(|it| format!("server {} max_fails=0;", it.address));
    let servers = lines.collect::<String>();
    nginx(folder, port, &shown("upstream commander {", port, &servers))
}

fn shown_haproxy(folder: &Folder, port: u16, servers: &[&Server]) -> Running {
    let lines = servers.iter().enumerate();
    let lines = lines.map(|(number, it)| format!("server s{number} {}\n", it.address));
    let servers = lines.collect::<String>();
    proxy(folder, "haproxy", &shown("defaults", port, &servers), port)
}

/// Through `address`, events come one by one, and a client that leaves ends its command.
fn streams_and_ends(server: &Server, address: &str, fields: &[&str]) {
    let folder = Folder::new();
    let gate = folder.path("gate");
    let command = format!(
        "sh -c 'echo first; until [ -e {gate} ]; do sleep 0.02; done; echo second; exec sleep 1000'"
    );
    let mut curl = Command::new("curl");
    curl.args(["-sN", &format!("http://{address}{}", run_target(&command))]);
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

#[test]
#[ignore = "needs curl"]
fn clients_curl() {
    let server = Server::start(&[]);
    let url = format!("http://{}/run", server.address);
    let events = parse_events(
        text_of("curl", &["-sN", "--data-urlencode", "command=echo a&b", &url]).as_bytes(),
    );
    assert_eq!(
        (output(&events, "stdout").as_str(), outcome(&events).as_str()),
        ("a&b\n", "exited:0")
    );
    let folder = Folder::new();
    let large = folder.write("large", vec![b'x'; 3 << 20]);
    // Over 1 MiB curl expects 100 Continue.
    let count = text_of(
        "curl",
        &[
            "-sN",
            "-H",
            "Accept: text/plain",
            "--data-binary",
            &format!("@{large}"),
            &format!("{url}?command=wc+-c"),
        ],
    );
    assert_eq!(count.trim(), (3 << 20).to_string());
    let chunked = text_of(
        "curl",
        &[
            "-sN",
            "-H",
            "Accept: text/plain",
            "-X",
            "POST",
            "-T",
            &large,
            "-H",
            "Transfer-Encoding: chunked",
            &format!("{url}?command=wc+-c"),
        ],
    );
    assert_eq!(chunked.trim(), (3 << 20).to_string());
    streams_and_ends(&server, &server.address, &[]);
}

#[test]
#[ignore = "needs busybox and nc"]
fn clients_busybox_and_nc() {
    let server = Server::start(&[]);
    let events = text_of(
        "busybox",
        &["wget", "-q", "-O", "-", &format!("http://{}/run?command=echo+hi", server.address)],
    );
    assert_eq!(output(&parse_events(events.as_bytes()), "stdout"), "hi\n");
    let (host, port) = server.address.split_once(':').unwrap();
    let mut nc = Command::new("nc")
        .args(["-N", host, port])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    nc.stdin
        .take()
        .unwrap()
        .write_all(b"GET /run?command=sh+-c+'sleep+0.5;+echo+late' HTTP/1.0\r\n\r\n")
        .unwrap();
    let output = String::from_utf8(nc.wait_with_output().unwrap().stdout).unwrap();
    assert!(output.contains("late\\n") && output.contains("event: exit"), "{output}");
}

#[test]
#[ignore = "needs nginx"]
fn clients_behind_nginx() {
    let (folder, port) = (Folder::new(), free_port());
    let address = format!("127.0.0.1:{port}");
    // As it comes, nginx sends its upstream's name as Host, which rule 1 refuses, unless there is a token.
    let token = folder.write("token", "s3cret");
    let with_token = Server::start(&["--token-file", &token]);
    let plain = format!(
        "server {{ listen 127.0.0.1:{port}; location / {{ proxy_pass http://{}; }} }}",
        with_token.address
    );
    let plain = nginx(&folder, port, &plain);
    streams_and_ends(&with_token, &address, &["Authorization: Bearer s3cret"]);
    drop(plain);
    let full = Server::start(&["--max-connections", "1"]);
    let (server, port) = (Server::start(&[]), free_port());
    let (_held, _) = full.begin("sleep 1000");
    let _proxy = shown_nginx(&folder, port, &[&full, &server]);
    let address = format!("127.0.0.1:{port}");
    streams_and_ends(&server, &address, &[]);
    fails_over(&address);
}

#[test]
#[ignore = "needs haproxy"]
fn clients_behind_haproxy() {
    let (folder, port) = (Folder::new(), free_port());
    // As it comes, HAProxy passes Host through and streams, but does not notice a client that leaves.
    let server = Server::start(&[]);
    let plain = format!(
        "defaults\n mode http\n timeout connect 5s\n timeout client 1h\n timeout server 1h\nlisten l\n bind 127.0.0.1:{port}\n server s {}\n",
        server.address
    );
    let plain = proxy(&folder, "haproxy", &plain, port);
    let url = format!("http://127.0.0.1:{port}{}", run_target("sh -c 'echo hi; exit 3'"));
    let events = parse_events(text_of("curl", &["-sN", &url]).as_bytes());
    assert_eq!(
        (output(&events, "stdout").as_str(), outcome(&events).as_str()),
        ("hi\n", "exited:3")
    );
    drop(plain);
    let full = Server::start(&["--max-connections", "1"]);
    let (_held, _) = full.begin("sleep 1000");
    let port = free_port();
    let _proxy = shown_haproxy(&folder, port, &[&full, &server]);
    let address = format!("127.0.0.1:{port}");
    streams_and_ends(&server, &address, &[]);
    fails_over(&address);
}

/// What a library's client says that it saw, one event name a line.
const PYTHON: &str = r#"
import sys, httpx, requests, sseclient
from httpx_sse import connect_sse
url = sys.argv[1] + "/run"
with httpx.Client() as client:
    with connect_sse(client, "GET", url, params={"command": "printf '\\303\\251\\n'"}) as source:
        for event in source.iter_sse():
            print(event.event, event.json().get("out"))
response = requests.get(url, params={"command": "echo two"}, stream=True)
for event in sseclient.SSEClient(response).events():
    print(event.event)
"#;

const NODE: &str = r#"
import { EventSource } from 'eventsource';
import { createParser } from 'eventsource-parser';
const url = process.argv[2] + '/run?command=echo+hi';
const names = [];
const parser = createParser({ onEvent: (event) => names.push(event.event) });
for await (const part of (await fetch(url)).body.pipeThrough(new TextDecoderStream())) parser.feed(part);
console.log(names.join());
const source = new EventSource(url);
for (const name of ['start', 'stdout', 'exit']) source.addEventListener(name, () => console.log(name));
source.onerror = (error) => { if (source.readyState === 2) { console.log(error.code); process.exit(); } };
"#;

#[test]
#[ignore = "needs httpx-sse and sseclient-py"]
fn clients_in_python() {
    let (folder, server) = (Folder::new(), Server::start(&[]));
    let script = folder.write("client.py", PYTHON);
    let seen = text_of(
        &format!("{}/bin/python", libraries()),
        &[&script, &format!("http://{}", server.address)],
    );
    let expected = "start None\nstdout é\n\nexit exited\nstart\nstdout\nexit\n";
    assert_eq!(seen, expected);
}

#[test]
#[ignore = "needs eventsource and eventsource-parser"]
fn clients_in_node() {
    let server = Server::start(&[]);
    let script = format!("{}/client.mjs", libraries());
    std::fs::write(&script, NODE).unwrap();
    // The reconnect is answered 204, and runs nothing.
    let seen = text_of("node", &[&script, &format!("http://{}", server.address)]);
    assert_eq!(seen, "start,stdout,exit\nstart\nstdout\nexit\n204\n");
    assert_eq!(server.log().matches(" run ").count(), 2);
}

#[test]
#[ignore = "needs curl, nginx and haproxy"]
fn clients_of_four_instances() {
    let servers = [(); 4].map(|()| Server::start(&["--max-connections", "2"]));
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
    let server = Server::start(&["--max-connections", "400", "--stall", "3"]);
    let rest = server.at_rest();
    // A browser by its User-Agent, it needs another field to be heard, which it offers no way to send but behind a cookie.
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
        let mut attack = Running(attack.unwrap(), "KILL");
        wait_for("the attack", || server.threads() > 50);
        // A good client is served all the while, until the last of them has been given up.
        let mut served = 0;
        wait_for("the attackers to be given up", || {
            assert_eq!(outcome(&server.run("true")), "exited:0", "{mode:?}");
            served += 1;
            server.threads() < 5
        });
        assert!(attack.0.try_wait().unwrap().is_none(), "{mode:?}");
        assert!(served > 20, "{mode:?}: {served}");
    }
    server.comes_to_rest(rest);
}
