//! Section 1, "Two processes": what stays, what it hands on, what is left when either ends.

use crate::support::*;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

#[test]
fn the_server_has_a_session_of_its_own() {
    let mut server = Server::start(&[]);
    let field = |pid, field| stat_field(pid, field).unwrap();
    assert_eq!(field(server.pid, PARENT), server.supervisor.to_string());
    assert_eq!(field(server.pid, SESSION), server.pid.to_string());
    assert_ne!(field(server.supervisor, SESSION), field(server.pid, SESSION));
    assert_eq!(field(server.pid, TERMINAL), "0");
    // It only waits.
    let count = |folder| {
        let folder = format!("/proc/{}/{folder}", server.supervisor);
        std::fs::read_dir(folder).unwrap()
    };
    assert_eq!(count("task").count(), 1);
    let sockets = count("fd").filter_map(|entry| std::fs::read_link(entry.ok()?.path()).ok());
    let sockets: Vec<_> =
        sockets.filter(|link| link.to_string_lossy().starts_with("socket:")).collect();
    assert!(sockets.is_empty(), "{sockets:?}");
    let (client, pid) = server.begin("sleep 1000");
    assert_eq!(field(pid, PARENT), server.pid.to_string());
    assert_eq!(field(pid, SESSION), server.pid.to_string());
    assert_eq!(field(pid, TERMINAL), "0");
    // Whoever asks for a password learns at once that there is nobody to ask.
    let events = server.run("sh -c 'read x </dev/tty'");
    assert!(!outcome(&events).ends_with(":0"), "{events:?}");
    assert!(output(&events, "stderr").contains("/dev/tty"));
    drop(client);
    server.signal("TERM");
    assert_eq!(server.exit_status().code(), Some(0));
}

#[test]
fn signals_end_the_server_and_every_command() {
    at_once(
        [
            ("TERM", true),
            ("INT", true),
            ("HUP", true),
            ("TERM", false),
            ("INT", false),
            ("HUP", false),
        ],
        |(signal, to_supervisor)| {
            let mut server = Server::start(&["--grace", "0.7"]);
            let (mut client, pid) = server.begin("sleep 1000");
            let (mut stubborn, stubborn_pid) =
                server.begin("sh -c 'trap \"\" TERM; echo ready; while :; do sleep 0.1; done'");
            stubborn.read_until("ready");
            let _idle = server.connect();
            let start = Instant::now();
            if to_supervisor {
                server.signal(signal);
            } else {
                signal_process(server.pid, signal);
            }
            let events = client.rest();
            assert_eq!(
                (events[0].event.as_str(), outcome(&events).as_str()),
                ("err", "shutdown:15")
            );
            assert_eq!(outcome(&stubborn.rest()), "shutdown:9");
            assert_eq!(server.exit_status().code(), Some(0));
            assert!(start.elapsed() < Duration::from_secs(6));
            assert!(!is_alive(pid) && !is_alive(stubborn_pid));
            assert!(server.session().is_empty() && !server.is_alive());
            assert!(std::net::TcpStream::connect(&server.address).is_err());
            server.logged(&["shutdown"]);
        },
    );
}

/// A shell ignores these for what it starts in the background, and whoever starts a program may block them: it is to be
/// stopped all the same.
#[test]
fn signals_that_were_ignored_at_the_start_end_it_but_for_sighup() {
    for signal in ["TERM", "INT"] {
        let mut command = binary_by_shell("trap '' TERM INT CHLD");
        command.args(["--listen", "127.0.0.1:0"]);
        let mut server = Server::start_command(command);
        assert_eq!(outcome(&server.run("sh -c 'exit 3'")), "exited:3");
        let (mut client, _) = server.begin("sleep 1000");
        server.signal(signal);
        assert_eq!(outcome(&client.rest()), "shutdown:15");
        assert_eq!(server.exit_status().code(), Some(0));
    }
    // As `nohup` has it.
    let mut command = binary_by_shell("trap '' HUP");
    command.args(["--listen", "127.0.0.1:0"]);
    let mut server = Server::start_command(command);
    let (mut client, pid) = server.begin("sleep 1000");
    for _ in 0..3 {
        server.signal("HUP");
        assert_eq!(outcome(&server.run("sleep 0.3")), "exited:0");
    }
    assert!(is_alive(pid) && !server.log().contains("shutdown"));
    server.signal("TERM");
    assert_eq!(outcome(&client.rest()), "shutdown:15");
    assert_eq!(server.exit_status().code(), Some(0));
}

#[test]
#[ignore = "needs GNU coreutils' env"]
fn root_signals_that_were_blocked_at_the_start_end_it() {
    for signal in ["TERM", "INT", "HUP"] {
        let mut command = Command::new("env");
        command.arg("--block-signal").args(program());
        command.args(["--listen", "127.0.0.1:0"]);
        let mut server = Server::start_command(command);
        let status = output(&server.run("cat /proc/self/status"), "stdout");
        assert!(status.contains("SigBlk:\t0000000000000000"), "{status}");
        let (mut client, _) = server.begin("sleep 1000");
        server.signal(signal);
        assert_eq!(outcome(&client.rest()), "shutdown:15");
        assert_eq!(server.exit_status().code(), Some(0));
    }
}

/// Whenever it comes: before there is a server, before there is a handler, or after.
#[test]
fn a_signal_while_it_starts_is_not_lost() {
    for round in 0..40 {
        let address = free_address();
        let mut command = binary();
        command.args(["--listen", &address]).stdin(Stdio::null());
        command.stdout(Stdio::null()).stderr(Stdio::null());
        let mut process = command.spawn().unwrap();
        let delay = Duration::from_micros(round / 2 * 150);
        std::thread::sleep(delay);
        if round % 2 == 0 {
            signal_process(process.id(), "TERM");
        } else {
            process.kill().unwrap();
        }
        let mut status = None;
        wait_for("the program to end", || {
            status = process.try_wait().unwrap();
            status.is_some()
        });
        if round % 2 == 0 {
            use std::os::unix::process::ExitStatusExt;
            let status = status.unwrap();
            let is_ended = status.code() == Some(0) || status.signal() == Some(15);
            assert!(is_ended || status.code() == Some(128 + 15), "{status:?}");
        }
        // No server is left behind; its command line has the address.
        wait_for("the server to end", || processes_told(&address).is_empty());
    }
}

/// Commands whose processes are of several groups, and how many processes each has. All print something and then wait.
fn families(folder: &Folder) -> Vec<(String, usize)> {
    let in_group = in_group(folder);
    let script = |name: &str, text: &str| format!("sh {}", folder.write(name, text));
    let ignoring = "trap '' TERM; echo; sleep 1000; :";
    vec![
        ("sh -c 'echo; timeout 1000 sleep 1000; :'".to_string(), 3),
        ("sh -c 'echo; timeout 1000 timeout 999 sleep 1000; :'".to_string(), 4),
        ("sh -c 'echo; sleep 1000 & timeout 1000 sleep 1000 & wait'".to_string(), 4),
        // Their parent goes at SIGTERM, they do not.
        (script("1", &format!("timeout 1000 sh -c \"{ignoring}\"; :")), 4),
        // Job control, as an interactive shell has it, in two generations.
        (
            script(
                "2",
                &format!(
                    "echo\nsh {in_group} 0 'sleep 1000 & sh {in_group} 0 \"exec sleep 1000\" & wait' &\nsleep 1000 & wait"
                ),
            ),
            5,
        ),
        // In a group of its own and stopped.
        (script("3", &format!("echo\nsh {in_group} 0 'kill -STOP $$' & wait")), 2),
        // Without a parent, in a group of its own.
        (script("4", "(timeout 1000 sleep 1000 &)\necho; sleep 1000; :"), 4),
    ]
}

/// Starts all families, and waits until all their processes are there.
fn begin_families(server: &Server, folder: &Folder) -> Vec<Client> {
    let families = families(folder);
    let mut clients = Vec::new();
    for (command, _) in &families {
        let (mut client, _) = server.begin(command);
        client.read_until("\\n");
        clients.push(client);
    }
    server.session_has(families.iter().map(|(_, count)| count).sum());
    clients
}

#[test]
fn nothing_is_left_when_the_server_is_killed() {
    let folder = Folder::new();
    for (signal, number) in [("KILL", 9), ("USR1", 10)] {
        let mut server = Server::start(&["--grace", "1000"]);
        let _clients = begin_families(&server, &folder);
        let killed = Instant::now();
        signal_process(server.pid, signal);
        // Nobody else holds it, so that the next one can start.
        wait_for("the port to be free", || std::net::TcpListener::bind(&server.address).is_ok());
        assert_eq!(server.exit_status().code(), Some(128 + number));
        // It sees to all of that before it ends.
        assert_eq!(server.session(), [0; 0]);
        assert!(killed.elapsed() < Duration::from_secs(3), "{:?}", killed.elapsed());
        let next = Server::start_command({
            let mut command = binary();
            command.args(["--listen", &server.address]);
            command
        });
        assert_eq!(outcome(&next.run("true")), "exited:0");
    }
}

#[test]
fn nothing_is_left_when_the_server_ends() {
    let folder = Folder::new();
    let mut server = Server::start(&["--grace", "0.5"]);
    let mut clients = begin_families(&server, &folder);
    server.signal("TERM");
    for client in &mut clients {
        assert!(outcome(&client.rest()).starts_with("shutdown:"));
    }
    assert_eq!(server.exit_status().code(), Some(0));
    assert_eq!(server.session(), [0; 0]);
}

#[test]
fn a_second_signal_leaves_nothing_either() {
    let folder = Folder::new();
    let mut server = Server::start(&["--grace", "1000"]);
    let mut clients = begin_families(&server, &folder);
    server.signal("TERM");
    clients[3].read_until("event: err");
    std::thread::sleep(Duration::from_millis(400));
    // What ignores SIGTERM has its grace period.
    assert!(!server.session().is_empty() && server.is_alive());
    let start = Instant::now();
    server.signal("TERM");
    assert_eq!(server.exit_status().code(), Some(0));
    assert_eq!(server.session(), [0; 0]);
    assert!(start.elapsed() < Duration::from_secs(3), "{:?}", start.elapsed());
}

/// A command that takes a while to end in its own way, and tells that it could.
fn careful(folder: &Folder) -> (String, String) {
    let done = folder.path("done");
    let script =
        format!("trap 'sleep 1; echo >{done}; exit' TERM; echo ready; while :; do sleep 0.1; done");
    (format!("sh {}", folder.write("careful", script)), done)
}

#[test]
fn the_server_ends_in_its_own_way_when_the_supervisor_is_killed() {
    let folder = Folder::new();
    let mut server = Server::start(&["--grace", "10"]);
    let (command, done) = careful(&folder);
    let (mut client, pid) = server.begin(&command);
    client.read_until("ready");
    let (mut other, _) = server.begin("sh -c 'timeout 1000 sleep 1000; :'");
    server.session_has(5);
    server.process.kill().unwrap();
    server.process.wait().unwrap();
    let events = client.rest();
    assert_eq!(events[0].event, "err");
    assert!(outcome(&events).starts_with("shutdown:"));
    assert_eq!(outcome(&other.rest()), "shutdown:15");
    server.is_gone();
    assert!(std::path::Path::new(&done).exists());
    assert!(!is_alive(pid));
    assert_eq!(server.session(), [0; 0]);
    assert!(std::net::TcpStream::connect(&server.address).is_err());
}

/// As `killall` does, and a terminal; the second in fact is another matter.
#[test]
fn signals_that_come_together_are_one() {
    let to_both = |server: &Server, signal: &str| {
        let pids = [server.supervisor, server.pid].map(|pid| pid.to_string());
        succeeds(Command::new("kill").args(["-s", signal]).args(pids));
    };
    let to_one = |server: &Server, signal: &str| server.signal(signal);
    type Way<'a> = (&'a str, &'a (dyn Fn(&Server) + Sync));
    let ways: [Way; 5] = [
        ("TERM to both", &|server| to_both(server, "TERM")),
        ("INT to both", &|server| to_both(server, "INT")),
        ("TERM twice", &|server| {
            let pid = server.supervisor;
            let script = format!("kill -TERM {pid}; kill -TERM {pid}; kill -INT {pid}");
            succeeds(Command::new("sh").args(["-c", &script]));
        }),
        ("HUP to both", &|server| to_both(server, "HUP")),
        // A terminal that closes sends several, in its own time.
        ("HUP twice", &|server| {
            to_one(server, "HUP");
            std::thread::sleep(Duration::from_millis(400));
            to_both(server, "HUP");
        }),
    ];
    at_once(ways, |(name, signal)| {
        let folder = Folder::new();
        let mut server = Server::start(&["--grace", "20"]);
        let (command, done) = careful(&folder);
        let (mut client, _) = server.begin(&command);
        client.read_until("ready");
        signal(&server);
        assert!(outcome(&client.rest()).starts_with("shutdown:"), "{name}");
        assert_eq!(server.exit_status().code(), Some(0), "{name}");
        assert!(std::path::Path::new(&done).exists(), "{name}");
    });
}

#[test]
fn a_second_signal_does_not_wait() {
    at_once(
        [("TERM", "TERM"), ("INT", "INT"), ("TERM", "INT"), ("INT", "TERM")],
        |(first, second)| {
            let mut server = Server::start(&["--grace", "1000"]);
            let (mut client, pid) =
                server.begin("sh -c 'trap \"\" TERM; echo ready; while :; do sleep 0.1; done'");
            client.read_until("ready");
            server.signal(first);
            client.read_until("event: err");
            std::thread::sleep(Duration::from_millis(400));
            assert!(is_alive(pid));
            let start = Instant::now();
            server.signal(second);
            assert_eq!(server.exit_status().code(), Some(0));
            assert!(start.elapsed() < Duration::from_secs(3), "{:?}", start.elapsed());
            is_gone(pid);
        },
    );
}

/// What has called `setsid` is nobody's but its own, however the server ends.
#[test]
fn what_has_left_the_session_is_left_alone() {
    for signal in ["TERM", "KILL"] {
        let mut server = Server::start(&[]);
        let (mut client, leader) =
            server.begin("sh -c 'setsid sh -c \"echo \\$\\$; exec sleep 1000\" & sleep 1000'");
        let printed = parse_events(client.read_until("\\n").as_bytes());
        let escaped: u32 = output(&printed, "stdout").trim().parse().unwrap();
        signal_process(server.pid, signal);
        server.exit_status();
        assert!(!is_alive(leader));
        let is_left = is_alive(escaped);
        signal_process(escaped, "KILL");
        assert!(is_left, "{signal}");
    }
}

#[test]
fn a_failure_to_start_is_the_supervisors_status_too() {
    let taken = Server::start(&[]);
    for (options, status) in [(["--listen", &taken.address], 1), (["--timeout", "x"], 2)] {
        let (code, stdout, stderr) = output_of(binary().args(options));
        assert_eq!((code, stdout.as_str()), (status, ""), "{stderr}");
        assert_eq!(stderr.lines().count(), 1, "{stderr}");
    }
}

/// The program as process 1 of a namespace of its own, with a `/proc` that shows it or one that does not.
fn as_pid_1(proc: Option<&str>, options: &[&str]) -> Server {
    let mut command = Command::new("unshare");
    command.args(["--pid", "--fork", "--kill-child"]).args(proc);
    command.args(program()).args(["--listen", "127.0.0.1:0"]);
    command.args(options);
    Server::start_below(command, 1)
}

#[test]
#[ignore = "needs root and util-linux"]
fn root_as_pid_1_no_zombie_stays() {
    let mut server = as_pid_1(Some("--mount-proc"), &["--grace", "0.5"]);
    let status = std::fs::read_to_string(format!("/proc/{}/status", server.supervisor));
    let line = format!("NSpid:\t{}\t1\n", server.supervisor);
    assert!(status.unwrap().contains(&line));
    for _ in 0..5 {
        // What dies by the server's hand, by itself, and in a session of its own.
        for left in ["sleep 9", "sleep 0.2 >/dev/null 2>&1", "setsid sleep 0.3"] {
            let events = server.run(&format!("sh -c '{left} & exit 4'"));
            assert_eq!(outcome(&events), "exited:4");
        }
    }
    wait_for("all that fell to it to be reaped", || {
        children_of(server.supervisor) == [server.pid] && children_of(server.pid).is_empty()
    });
    assert!(!server.log().contains("/proc"), "{}", server.log());
    let (mut client, _) = server.begin("sleep 1000");
    server.signal("TERM");
    assert_eq!(outcome(&client.rest()), "shutdown:15");
    assert_eq!(server.exit_status().code(), Some(0));
}

#[test]
#[ignore = "needs root and util-linux"]
fn root_as_pid_1_everything_ends_with_it() {
    let folder = Folder::new();
    let escaped = "setsid sleep 1001 >/dev/null 2>&1 & sleep 0.2";
    // The server killed: what the supervisor ends with is what `unshare` ends with.
    let mut server = as_pid_1(Some("--mount-proc"), &[]);
    let _clients = begin_families(&server, &folder);
    server.run(&format!("sh -c '{escaped}'"));
    let mut left = children_of(server.supervisor);
    assert!(left.len() > 1);
    signal_process(server.pid, "KILL");
    assert_eq!(server.exit_status().code(), Some(137));
    assert_eq!(server.session(), [0; 0]);
    left.into_iter().for_each(is_gone);
    // Process 1 killed.
    let mut server = as_pid_1(Some("--mount-proc"), &[]);
    let _clients = begin_families(&server, &folder);
    server.run(&format!("sh -c '{escaped}'"));
    left = children_of(server.supervisor);
    signal_process(server.supervisor, "KILL");
    server.exit_status();
    left.into_iter().for_each(is_gone);
    server.session_has(0);
}

/// Where nobody's processes can be seen, it is said; the groups are still found, and all else goes on.
#[test]
#[ignore = "needs root and util-linux"]
fn root_without_a_proc_of_its_own() {
    let hidden = || {
        let mut command = Command::new("unshare");
        let script = "mount -t tmpfs none /proc && exec \"$@\"";
        command.args(["--mount", "sh", "-c", script, "sh"]);
        command.args(program()).args(["--listen", "127.0.0.1:0"]);
        Server::start_command(command)
    };
    let foreign = || as_pid_1(None, &[]);
    for (name, start) in [("hidden", &hidden as &dyn Fn() -> Server), ("foreign", &foreign)] {
        let mut server = start();
        let log = server.log();
        server.logged(&["/proc"]);
        let (client, _) = server.begin("sh -c 'sleep 1000 & sleep 1001 & wait'");
        server.session_has(3);
        drop(client);
        server.session_has(0);
        assert_eq!(outcome(&server.run("sh -c 'sleep 1000 & exit 3'")), "exited:3");
        server.session_has(0);
        let (mut client, _) = server.begin("sleep 1000");
        server.signal("TERM");
        assert_eq!(outcome(&client.rest()), "shutdown:15", "{name}");
        assert_eq!(server.exit_status().code(), Some(0), "{log}");
        // Either one killed.
        let mut server = start();
        let (_client, _) = server.begin("sleep 1000");
        let seen = server.session();
        signal_process(server.pid, "KILL");
        assert_eq!(server.exit_status().code(), Some(137), "{name}");
        for process in seen {
            if is_alive(process) {
                signal_process(process, "KILL");
            }
        }
        let mut server = start();
        let (mut client, _) = server.begin("sleep 1000");
        signal_process(server.supervisor, "KILL");
        // Process 1 takes everything with it.
        if name == "hidden" {
            assert_eq!(outcome(&client.rest()), "shutdown:15");
        }
        server.exit_status();
        server.is_gone();
        server.session_has(0);
    }
    let usual = Server::start(&[]);
    assert_eq!(outcome(&usual.run("true")), "exited:0");
    usual.logged(&["Z exit "]);
    assert!(!usual.log().contains("/proc"), "{}", usual.log());
}

/// A server of another user's, and a program that becomes root: the first may not signal the second.
struct Unreachable {
    folder: Folder,
    binary: Vec<String>,
}

impl Unreachable {
    fn new() -> Unreachable {
        let folder = Folder::new();
        let become_root = folder.path("become-root");
        let path = Command::new("sh").args(["-c", "command -v setpriv"]).output();
        let path = String::from_utf8(path.unwrap().stdout).unwrap();
        std::fs::copy(path.trim(), &become_root).unwrap();
        succeeds(Command::new("chmod").args(["4755", &become_root]));
        Unreachable { binary: binary_for_all(&folder), folder }
    }

    fn server(&self, options: &[&str]) -> Server {
        let mut command = Command::new("setpriv");
        command.args(["--reuid=54325", "--regid=54325", "--clear-groups"]);
        command.args(&self.binary);
        command.args(["--listen", "127.0.0.1:0"]).args(options);
        command.current_dir("/");
        Server::start_command(command)
    }

    fn command(&self, command: &str) -> String {
        let become_root = self.folder.path("become-root");
        format!("{become_root} --reuid=0 --clear-groups {command}")
    }
}

fn is_roots(pid: u32) {
    wait_for("the program to become root", || {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        status.contains("\nUid:\t0\t0\t0\t0\n")
    });
}

#[test]
#[ignore = "needs root and util-linux"]
fn root_what_cannot_be_killed_is_left() {
    let unreachable = Unreachable::new();
    let command = unreachable.command("sleep 1000");
    let server = unreachable.server(&["--timeout", "1", "--grace", "0.5", "--max-commands", "1"]);
    let rest = server.at_rest();
    let (mut client, pid) = server.begin(&command);
    is_roots(pid);
    let events = client.rest();
    assert_eq!(outcome(&events), "left:");
    let errors = events.iter().filter(|event| event.event == "err");
    assert!(errors.count() >= 1, "{events:?}");
    let ms = events.last().unwrap().number("ms");
    assert!((2400..8000).contains(&ms), "{ms}");
    server.logged(&["Z exit ", "out=left"]);
    // Its place is free.
    assert!(is_alive(pid));
    assert_eq!(outcome(&server.run("true")), "exited:0");
    // When it ends by itself, nothing of it stays.
    signal_process(pid, "KILL");
    server.comes_to_rest(rest);

    // The client gone.
    let (client, pid) = server.begin(&command);
    is_roots(pid);
    drop(client);
    wait_for("the place to be free", || server.get("/run?command=true", "").status == 200);
    assert!(is_alive(pid));
    signal_process(pid, "KILL");
    server.comes_to_rest(rest);

    // In plain text neither field comes.
    let mut client = server.connect();
    client.write(format!(
        "GET {} HTTP/1.1\r\nHost: {}\r\nAccept: text/plain\r\n\r\n",
        run_target(&command),
        server.address
    ));
    let response = client.response();
    assert!(response.status == 200 && response.trailers.is_empty(), "{response:?}");
    let pid = server.children()[0];
    signal_process(pid, "KILL");
    server.comes_to_rest(rest);

    // The server's own end.
    let mut server = unreachable.server(&["--grace", "0.5"]);
    let (mut client, pid) = server.begin(&command);
    is_roots(pid);
    let start = Instant::now();
    server.signal("TERM");
    assert_eq!(outcome(&client.rest()), "left:");
    assert_eq!(server.exit_status().code(), Some(0));
    assert!(start.elapsed() < Duration::from_secs(6), "{:?}", start.elapsed());
    assert!(is_alive(pid));
    signal_process(pid, "KILL");
}

#[test]
#[ignore = "needs root and util-linux"]
fn root_what_cannot_be_signalled_holds_no_supervisor() {
    let unreachable = Unreachable::new();
    let mut server = unreachable.server(&[]);
    let (_client, pid) = server.begin(&unreachable.command("sleep 1000"));
    is_roots(pid);
    let (_other, other) = server.begin("sh -c 'timeout 1000 sleep 1000; :'");
    server.session_has(4);
    signal_process(server.pid, "KILL");
    assert_eq!(server.exit_status().code(), Some(137));
    assert_eq!(server.session(), [pid]);
    assert!(!is_alive(other));
    signal_process(pid, "KILL");
}

/// The server with a terminal as its stderr, by `script`, which goes when the test drops it.
struct Terminal {
    server: Server,
    folder: Folder,
}

impl Terminal {
    fn new(prefix: &str, options: &[&str]) -> Terminal {
        let folder = Folder::new();
        let ready = folder.write("ready", "");
        let program = program().join(" ");
        let line =
            format!("exec {prefix} {program} --listen 127.0.0.1:0 {} >{ready}", options.join(" "));
        let mut command = Command::new("script");
        command.args(["-q", "-c", &line, "/dev/null"]);
        command.env("SHELL", "/bin/sh").stdin(Stdio::piped());
        // Nobody reads what the terminal shows.
        let process = command.stdout(Stdio::null()).spawn().unwrap();
        let mut address = None;
        wait_for("the line of readiness", || {
            // Beside the log, where `nohup` has sent that here too.
            let text = std::fs::read_to_string(&ready).unwrap();
            address = text.lines().find_map(address_of);
            address.is_some()
        });
        let server = Server::found(process, address.unwrap(), 1);
        assert_ne!(stat_field(server.supervisor, TERMINAL).unwrap(), "0");
        Terminal { server, folder }
    }

    fn types(&mut self, bytes: &[u8]) {
        use std::io::Write;
        let stdin = self.server.process.stdin.as_mut().unwrap();
        stdin.write_all(bytes).unwrap();
        stdin.flush().unwrap();
    }

    fn closes(&mut self) {
        self.server.process.kill().unwrap();
        self.server.process.wait().unwrap();
    }
}

#[test]
#[ignore = "needs util-linux's script, and bash"]
fn terminal_of_the_server_is_not_the_commands() {
    let terminal = Terminal::new("", &[]);
    let server = &terminal.server;
    for (command, success) in [
        ("sh -c 'read x </dev/tty'", false),
        ("stty -F /dev/tty -echo", false),
        ("sh -c 'echo x >/dev/tty'", false),
        ("bash -ic 'echo hi; exit 0'", true),
        // Job control without a terminal: a group for each.
        ("bash -c 'set -m; sleep 0.1 & wait'", true),
    ] {
        let events = server.run(command);
        assert_eq!(outcome(&events) == "exited:0", success, "{events:?}");
        assert!(outcome(&events).starts_with("exited:"), "{events:?}");
    }
    let (client, _) =
        server.begin("bash -c 'set -m; sleep 1000 & (sleep 1000; :) & sleep 1000; :'");
    server.session_has(5);
    drop(client);
    server.session_has(0);
}

#[test]
#[ignore = "needs util-linux's script"]
fn terminal_interrupt_is_one_signal() {
    let mut terminal = Terminal::new("", &["--grace", "20"]);
    let (command, done) = careful(&terminal.folder);
    let (mut client, _) = terminal.server.begin(&command);
    client.read_until("ready");
    terminal.types(b"\x03");
    assert!(outcome(&client.rest()).starts_with("shutdown:"));
    terminal.server.exit_status();
    terminal.server.is_gone();
    assert!(std::path::Path::new(&done).exists());
}

#[test]
#[ignore = "needs util-linux's script"]
fn terminal_that_closes_is_one_signal() {
    let mut terminal = Terminal::new("", &["--grace", "20"]);
    let (command, done) = careful(&terminal.folder);
    let (mut client, _) = terminal.server.begin(&command);
    client.read_until("ready");
    terminal.closes();
    assert!(outcome(&client.rest()).starts_with("shutdown:"));
    terminal.server.is_gone();
    assert!(std::path::Path::new(&done).exists());
}

#[test]
#[ignore = "needs util-linux's script"]
fn terminal_that_closes_ends_nothing_under_nohup() {
    let mut terminal = Terminal::new("nohup", &[]);
    let (mut client, pid) = terminal.server.begin("sleep 1000");
    let supervisor = terminal.server.supervisor;
    terminal.closes();
    for _ in 0..3 {
        assert_eq!(outcome(&terminal.server.run("sleep 0.3")), "exited:0");
    }
    assert!(is_alive(pid) && is_alive(supervisor));
    signal_process(supervisor, "TERM");
    assert_eq!(outcome(&client.rest()), "shutdown:15");
    terminal.server.is_gone();
}

/// Ctrl-S: a terminal that takes nothing until somebody presses another key.
#[test]
#[ignore = "needs util-linux's script"]
fn terminal_that_is_halted_holds_nothing_up() {
    let mut terminal = Terminal::new("", &["--verbose"]);
    terminal.types(b"\x13");
    std::thread::sleep(Duration::from_millis(300));
    let server = &terminal.server;
    for number in 0..40 {
        assert_eq!(server.get(&format!("/{number}"), "").status, 404);
    }
    let events = server.run("sh -c 'i=0; while [ $i -lt 3000 ]; do echo $i; i=$((i+1)); done'");
    assert_eq!(outcome(&events), "exited:0");
    let (client, pid) = server.begin("sleep 1000");
    drop(client);
    is_gone(pid);
    let (mut client, _) = server.begin("sleep 1000");
    server.signal("TERM");
    assert_eq!(outcome(&client.rest()), "shutdown:15");
    server.is_gone();
    terminal.closes();
}
