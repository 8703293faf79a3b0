//! Peers that die without a word: two network namespaces, joined by a link that is cut.

use crate::support::*;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering::SeqCst};
use std::time::{Duration, Instant};

/// Two joined namespaces, gone in the end.
struct Network {
    names: [String; 2],
}

impl Network {
    fn new() -> Network {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let (process, number) = (std::process::id(), COUNT.fetch_add(1, SeqCst));
        let names = ["a", "b"].map(|side| format!("ssec{side}{process}-{number}"));
        let [a, b] = &names;
        for line in [
            format!("netns add {a}"),
            format!("netns add {b}"),
            format!("link add v0 netns {a} type veth peer name v0 netns {b}"),
            format!("-n {a} addr add 10.9.0.1/24 dev v0"),
            format!("-n {b} addr add 10.9.0.2/24 dev v0"),
            format!("-n {a} link set lo up"),
            format!("-n {a} link set v0 up"),
            format!("-n {b} link set v0 up"),
        ] {
            succeeds(Command::new("ip").args(line.split(' ')));
        }
        Network { names }
    }

    fn command(&self, side: usize) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.names[side]]);
        command
    }

    fn server(&self, options: &[&str]) -> Server {
        let mut command = self.command(0);
        command.args(program()).args(options);
        Server::start_command(command)
    }

    /// `curl` on the other side.
    fn begin(&self, server: &Server, command: &str, accept: &str) -> Running {
        let url = format!("http://{}{}", server.address, run_target(command));
        let mut curl = self.command(1);
        curl.args(["curl", "-sN", "-H", &format!("Accept: {accept}"), &url]);
        Running(curl.stdout(Stdio::null()).spawn().unwrap())
    }

    fn cut(&self) {
        let command = ["-n", &self.names[1], "link", "set", "v0", "down"];
        succeeds(Command::new("ip").args(command));
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        for name in &self.names {
            let _ = Command::new("ip").args(["netns", "del", name]).status();
        }
    }
}

struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Within `--heartbeat` and `--stall`, whole seconds, rounded up.
#[test]
#[ignore = "needs root, iproute2 and curl"]
fn network_a_dead_peer_is_noticed() {
    for (heartbeat, stall, seconds) in [("2", "3", 5), ("8", "1", 9), ("0.3", "1.5", 3)] {
        let network = Network::new();
        let mut options = vec!["--listen", "10.9.0.1:0", "--no-token", "--grace", "0.5"];
        options.extend(["--heartbeat", heartbeat, "--stall", stall]);
        let server = network.server(&options);
        // One that fills what is between, and is then no reader. Plain text has no heartbeat.
        let clients: Vec<_> = ["sleep 1000", "yes", "sh -c 'while :; do echo x; sleep 0.1; done'"]
            .into_iter()
            .flat_map(|command| {
                ["text/event-stream", "text/plain"]
                    .map(|accept| network.begin(&server, command, accept))
            })
            .collect();
        wait_for("all commands", || server.children().len() == clients.len());
        let commands = server.children();
        std::thread::sleep(Duration::from_millis(1500));
        assert!(commands.iter().all(|&pid| is_alive(pid)));
        network.cut();
        let start = Instant::now();
        commands.into_iter().for_each(is_gone);
        let took = start.elapsed();
        assert!(took < Duration::from_secs(seconds + 2), "{heartbeat} and {stall}: {took:?}");
        server.session_has(0);
    }
}

/// One that is only slow, on a link that works, is not taken for dead.
#[test]
#[ignore = "needs root, iproute2 and curl"]
fn network_a_silent_stream_stays() {
    let network = Network::new();
    let mut options = vec!["--listen", "10.9.0.1:0", "--no-token"];
    options.extend(["--heartbeat", "1", "--stall", "1"]);
    let server = network.server(&options);
    let _clients = ["text/event-stream", "text/plain"]
        .map(|accept| network.begin(&server, "sleep 1000", accept));
    wait_for("both commands", || server.children().len() == 2);
    std::thread::sleep(Duration::from_secs(6));
    assert_eq!(server.session().len(), 2);
}

#[test]
#[ignore = "needs root, iproute2 and curl"]
fn network_any_address_needs_a_token() {
    let network = Network::new();
    for listen in ["0.0.0.0:0", "10.9.0.1:0", "[::]:0"] {
        let mut command = network.command(0);
        command.args(program()).args(["--listen", listen]);
        let (status, _, stderr) = output_of(&mut command);
        assert_eq!(status, 1, "{stderr}");
        assert!(stderr.contains("--token-file") && stderr.lines().count() == 1, "{stderr}");
    }
    let folder = Folder::new();
    let file = folder.write("token", "secret\n");
    for (token, fields) in [
        (&["--token-file", &*file][..], "Authorization: Bearer secret"),
        (&["--no-token"], "X-None: none"),
    ] {
        let mut options = vec!["--listen", "0.0.0.0:0"];
        options.extend(token);
        let server = network.server(&options);
        let port = server.address.strip_prefix("0.0.0.0:").unwrap();
        let mut curl = network.command(1);
        curl.args(["curl", "-sN", "-H", fields]);
        curl.arg(format!("http://10.9.0.1:{port}/run?command=echo+hello"));
        let text = curl.output().unwrap().stdout;
        let events = parse_events(&text);
        assert_eq!(output(&events, "stdout"), "hello\n");
        server.logged(&["Z run peer=10.9.0.2:"]);
    }
}
