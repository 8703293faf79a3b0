//! Peers that die without a word: two network namespaces, joined by a link that is cut.

use crate::support::*;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Two joined namespaces, gone in the end.
struct Network {
    names: [String; 2],
}

impl Network {
    fn new() -> Network {
        let names = ["a", "b"].map(|side| format!("ssec{side}{}", std::process::id()));
        let [a, b] = &names;
        for line in [
            format!("netns add {a}"),
            format!("netns add {b}"),
            format!("link add v0 netns {a} type veth peer name v0 netns {b}"),
            format!("-n {a} addr add 10.9.0.1/24 dev v0"),
            format!("-n {b} addr add 10.9.0.2/24 dev v0"),
            format!("-n {a} link set v0 up"),
            format!("-n {b} link set v0 up"),
        ] {
            let status = Command::new("ip").args(line.split(' ')).status().unwrap();
            assert!(status.success(), "ip {line}");
        }
        Network { names }
    }

    fn command(&self, side: usize, program: &str) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.names[side], program]);
        command
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        for name in &self.names {
            let _ = Command::new("ip").args(["netns", "del", name]).status();
        }
    }
}

struct Client(Child);

impl Drop for Client {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
#[ignore = "needs root and iproute2"]
fn network_a_dead_peer_is_noticed() {
    let network = Network::new();
    let mut command = network.command(0, BINARY);
    command.args([
        "--listen",
        "10.9.0.1:0",
        "--no-token",
        "--heartbeat",
        "2",
        "--stall",
        "3",
        "--grace",
        "0.5",
    ]);
    let server = Server::start_command(command);
    let begin = |command: &str, accept: &str| {
        let url = format!("http://{}{}", server.address, run_target(command));
        let mut curl = network.command(1, "curl");
        Client(
            curl.args(["-sN", "-H", &format!("Accept: {accept}"), &url])
                .stdout(Stdio::null())
                .spawn()
                .unwrap(),
        )
    };
    // Plain text has no heartbeat.
    let _clients = [
        begin("sleep 1000", "text/event-stream"),
        begin("yes", "text/event-stream"),
        begin("sleep 1001", "text/plain"),
    ];
    wait_for("all commands", || server.children().len() == 3);
    let commands = server.children();
    std::thread::sleep(Duration::from_millis(500));
    assert!(commands.iter().all(|&pid| is_alive(pid)));
    let status = Command::new("ip")
        .args(["-n", &network.names[1], "link", "set", "v0", "down"])
        .status()
        .unwrap();
    assert!(status.success());
    let start = Instant::now();
    commands.into_iter().for_each(is_gone);
    assert!(start.elapsed() < Duration::from_secs(8), "{:?}", start.elapsed());
}
