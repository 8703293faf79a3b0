//! Section 6: what a command gets, and how it ends.

use crate::support::*;
use std::io::Read;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::{Duration, Instant};

#[test]
fn what_a_command_gets() {
    let mut command = Command::new("sh");
    // Started by somebody who ignores signals, keeps descriptors open and has set a variable.
    let script = "trap '' CHLD HUP INT QUIT USR1 PIPE; exec 7</etc/passwd 9>/dev/null; exec \"$0\" --listen 127.0.0.1:0";
    command.args(["-c", script, BINARY]).env("MARK", "there").current_dir("/usr");
    let server = Server::start_command(command);
    let run = |command: &str| output(&server.run(command), "stdout");
    assert_eq!(run("sh -c 'pwd; echo $MARK'"), "/usr\nthere\n");
    let status = run("cat /proc/self/status");
    for field in ["SigBlk:", "SigIgn:", "SigCgt:"] {
        let line = status.lines().find_map(|line| line.strip_prefix(field)).unwrap();
        // glibc's spawn ignores the two signals that it keeps for itself, 32 and 33.
        let signals = u64::from_str_radix(line.trim(), 16).unwrap() & !(3 << 31);
        assert_eq!(signals, 0, "{field}{line}");
    }
    let descriptors = run("ls -l /proc/self/fd");
    let links = descriptors.lines().filter(|line| line.contains(" -> "));
    let names: Vec<_> =
        links.filter_map(|line| line.split(" -> ").next()?.rsplit(' ').next()).collect();
    assert_eq!(names, ["0", "1", "2", "3"], "{descriptors}");
    assert!(descriptors.contains("0 -> /dev/null"));
    let (client, pid) = server.begin("sleep 1000");
    assert_eq!(stat_field(pid, 2), Some(pid.to_string()));
    drop(client);
    assert_eq!(outcome(&server.run("sh -c 'exit 3'")), "exited:3");
    // Every signal in /proc is the server's own, or reaches a command as its default.
    assert_eq!(outcome(&server.run("sh -c 'kill -HUP $$'")), "killed:1");
}

/// Ends a stream in some way, and expects all processes whose ids it printed to be gone.
fn ends_all(
    server: &Server,
    command: &str,
    processes: usize,
    end: impl FnOnce(Client),
) -> Duration {
    let (mut client, leader) = server.begin(command);
    let mut printed = String::new();
    while printed.matches("\\n").count() < processes {
        printed.push_str(&client.read_until("\\n"));
    }
    let events = parse_events(printed.as_bytes());
    let mut pids: Vec<u32> =
        output(&events, "stdout").lines().map(|line| line.parse().unwrap()).collect();
    pids.push(leader);
    assert!(pids.iter().all(|&pid| is_alive(pid)));
    let start = Instant::now();
    end(client);
    pids.into_iter().for_each(is_gone);
    start.elapsed()
}

const FAMILY: &str = "sh -c 'sleep 1000 & echo $!; sh -c \"sleep 1001 & echo \\$!; wait\" & wait'";

#[test]
fn a_hang_up_kills_the_command_and_its_grandchildren() {
    let server = Server::start(&[]);
    let rest = server.at_rest();
    let took = ends_all(&server, FAMILY, 2, drop);
    assert!(took < Duration::from_secs(2), "{took:?}");
    let line = server.logged(&["exit", "out=gone"]);
    assert!(line.contains("signal=15") && line.contains("stdout_bytes="), "{line}");
    server.comes_to_rest(rest);
}

#[test]
fn a_reset_kills() {
    let server = Server::start(&[]);
    let (client, pid) = server.begin("sh -c 'sleep 0.3; echo unread; sleep 1000'");
    wait_for("output that nobody reads", || {
        client.stream.get_ref().peek(&mut [0; 200]).is_ok_and(|length| length > 0)
    });
    // Closing with unread input sends a reset.
    drop(client);
    is_gone(pid);
}

#[test]
fn a_hang_up_kills_one_that_prints_one_that_is_stopped_and_one_that_ignores_sigterm() {
    let server = Server::start(&["--grace", "0.5"]);
    ends_all(&server, "sh -c 'echo $$; while :; do echo x >&2; done'", 1, drop);
    let stubborn = "sh -c 'trap \"\" TERM; echo $$; while :; do sleep 0.1; done'";
    let took = ends_all(&server, stubborn, 1, drop);
    assert!(took >= Duration::from_millis(500), "{took:?}");
    wait_for("all to be logged", || server.log().matches("out=gone").count() == 2);
    assert!(server.log().contains("signal=9") && server.log().contains("signal=15"));
    // One that is stopped takes SIGTERM at once, not SIGKILL after the grace period.
    let server = Server::start(&["--grace", "1000"]);
    let (client, pid) = server.begin("sh -c 'kill -STOP $$; sleep 1000'");
    wait_for("the command to stop", || stat_field(pid, 0).as_deref() == Some("T"));
    drop(client);
    is_gone(pid);
    server.logged(&["exit", "signal=15"]);
}

#[test]
fn a_half_close_still_gets_its_answer() {
    // No heartbeat helps to tell it from a close.
    let server = Server::start(&["--heartbeat", "1000"]);
    let (mut client, _) = server.begin("sh -c 'sleep 1; echo late'");
    client.half_close();
    let events = client.rest();
    assert_eq!(
        (output(&events, "stdout").as_str(), outcome(&events).as_str()),
        ("late\n", "exited:0")
    );
    // But it does not keep a command alive for nobody.
    let (client, pid) = server.begin("sleep 1000");
    client.half_close();
    std::thread::sleep(Duration::from_millis(500));
    assert!(is_alive(pid));
    drop(client);
    is_gone(pid);
    // Plain text has no comments by which to find out.
    let mut client = server.connect();
    client.write(format!(
        "GET /run?command=sleep+1000 HTTP/1.1\r\nHost: {}\r\nAccept: text/plain\r\n\r\n",
        server.address
    ));
    assert_eq!(client.head().status, 200);
    client.half_close();
    wait_for("the command to be killed", || {
        server.children().is_empty() && server.log().matches("out=gone").count() == 2
    });
}

#[test]
fn a_client_that_does_not_read_is_given_up() {
    let server = Server::start(&["--stall", "1", "--grace", "0.5"]);
    let (client, pid) = server.begin("yes");
    is_gone(pid);
    server.logged(&["exit", "out=stalled"]);
    drop(client);
    // Nor does it hold up a timeout.
    let server = Server::start(&["--timeout", "1", "--grace", "0.5"]);
    let (_client, pid) = server.begin("yes");
    is_gone(pid);
}

#[test]
fn a_client_that_reads_slowly_slows_the_command() {
    let server = Server::start(&[]);
    server.run("true");
    let before = server.memory();
    let (mut client, pid) = server.begin("yes");
    let written = || {
        let io = std::fs::read_to_string(format!("/proc/{pid}/io")).unwrap();
        io.lines().find_map(|line| line.strip_prefix("wchar: ")).unwrap().to_string()
    };
    let mut last = written();
    wait_for("the command to be held up", || {
        std::thread::sleep(Duration::from_millis(300));
        std::mem::replace(&mut last, written()) == last
    });
    let more = server.memory() - before;
    assert!(more < 1024, "{more} kB");
    // It goes on where the client does.
    let mut buffer = vec![0; 1 << 20];
    for _ in 0..30 {
        client.stream.read_exact(&mut buffer).unwrap();
    }
    assert!(is_alive(pid));
    drop(client);
    is_gone(pid);
}

#[test]
fn what_a_command_leaves_running_may_print_for_a_moment() {
    // It is the pause that ends it.
    let server = Server::start(&["--grace", "1000"]);
    let start = Instant::now();
    let events =
        server.run("sh -c '(sleep 0.1; echo late; sleep 0.1; echo later; sleep 1000) & echo $!'");
    let out = output(&events, "stdout");
    let mut lines = out.lines();
    let pid: u32 = lines.next().unwrap().parse().unwrap();
    assert_eq!(
        (lines.collect::<Vec<_>>(), outcome(&events).as_str()),
        (vec!["late", "later"], "exited:0")
    );
    is_gone(pid);
    assert!(start.elapsed() < Duration::from_secs(3), "{:?}", start.elapsed());
    // One that never pauses ends with the grace period.
    let server = Server::start(&["--grace", "0.6"]);
    let start = Instant::now();
    assert_eq!(outcome(&server.run("sh -c 'yes & exit 5'")), "exited:5");
    assert!(start.elapsed() >= Duration::from_millis(600));
    // What has closed its streams is killed at once.
    let events = server.run("sh -c 'sleep 1000 >/dev/null 2>&1 & echo $!'");
    is_gone(output(&events, "stdout").trim().parse().unwrap());
}

#[test]
fn an_escaped_process_holds_nothing() {
    let server = Server::start(&["--grace", "0.5"]);
    let rest = server.at_rest();
    let events = server.run("sh -c 'setsid sh -c \"echo \\$\\$; exec sleep 1000\" & sleep 0.3'");
    let pid: u32 = output(&events, "stdout").trim().parse().unwrap();
    assert_eq!(outcome(&events), "exited:0");
    assert!(is_alive(pid));
    // Nor does one that prints without end, or one of a command that is killed.
    let events = server.run("sh -c 'setsid sh -c \"echo \\$\\$; exec yes\" & sleep 0.3'");
    let printer: u32 = output(&events, "stdout").lines().next().unwrap().parse().unwrap();
    let (mut client, leader) =
        server.begin("sh -c 'setsid sh -c \"echo \\$\\$; exec sleep 1000\" & sleep 1000'");
    let third = output(&parse_events(client.read_until("\\n").as_bytes()), "stdout")
        .trim()
        .parse()
        .unwrap();
    drop(client);
    is_gone(leader);
    assert!(is_alive(third));
    server.comes_to_rest(rest);
    signal_process(pid, "KILL");
    signal_process(third, "KILL");
    // The pipe that it wrote to has gone with its readers.
    is_gone(printer);
}

#[test]
fn closed_streams_are_not_the_end() {
    let server = Server::start(&[]);
    let events = server.run("sh -c 'exec >&- 2>&-; sleep 0.5; exit 4'");
    assert_eq!(outcome(&events), "exited:4");
    assert!(events.last().unwrap().number("ms") >= 500);
    let (client, pid) = server.begin("sh -c 'exec >&- 2>&-; exec sleep 1000'");
    drop(client);
    is_gone(pid);
}

#[test]
fn signals_end_the_server_and_every_command() {
    for signal in ["TERM", "INT", "HUP"] {
        let mut server = Server::start(&["--grace", "1"]);
        let (mut client, pid) = server.begin("sleep 1000");
        let (mut stubborn, stubborn_pid) =
            server.begin("sh -c 'trap \"\" TERM; echo ready; while :; do sleep 0.1; done'");
        stubborn.read_until("ready");
        let _idle = server.connect();
        let start = Instant::now();
        server.signal(signal);
        let events = client.rest();
        assert_eq!((events[0].event.as_str(), outcome(&events).as_str()), ("err", "shutdown:15"));
        assert_eq!(outcome(&stubborn.rest()), "shutdown:9");
        assert_eq!(server.exit_status().code(), Some(0));
        assert!(start.elapsed() < Duration::from_secs(5));
        assert!(!is_alive(pid) && !is_alive(stubborn_pid));
        assert!(std::net::TcpStream::connect(&server.address).is_err());
        server.logged(&["shutdown"]);
    }
}

/// Who says nothing is not waited for.
#[test]
fn idle_connections_do_not_hold_up_the_end() {
    let mut server = Server::start(&["--grace", "1000"]);
    let mut served = server.connect();
    served.write(format!("GET /none HTTP/1.1\r\nHost: {}\r\n\r\n", server.address));
    assert_eq!(served.response().status, 404);
    let (_silent, (ended, _)) = (server.connect(), server.begin("true"));
    drop(ended);
    server.signal("TERM");
    assert_eq!(server.exit_status().code(), Some(0));
}

#[test]
fn a_second_signal_does_not_wait() {
    let mut server = Server::start(&["--grace", "1000"]);
    let (mut client, pid) =
        server.begin("sh -c 'trap \"\" TERM; echo ready; while :; do sleep 0.1; done'");
    client.read_until("ready");
    server.signal("TERM");
    client.read_until("event: err");
    assert!(is_alive(pid));
    let start = Instant::now();
    server.signal("TERM");
    assert_eq!(server.exit_status().code(), Some(0));
    assert!(start.elapsed() < Duration::from_secs(3), "{:?}", start.elapsed());
    is_gone(pid);
}

#[test]
fn a_signal_amid_forty_spawns_leaves_nothing() {
    for round in 0..5 {
        let folder = Folder::new();
        let mut server = Server::start(&["--grace", "1"]);
        let mark = format!("{}", 100_000 + std::process::id() * 10 + round);
        let clients: Vec<_> = (0..40)
            .map(|_| {
                let mut client = server.connect();
                client.write(format!(
                    "GET /run?command=sleep+{mark} HTTP/1.1\r\nHost: {}\r\n\r\n",
                    server.address
                ));
                client
            })
            .collect();
        std::thread::sleep(Duration::from_millis(u64::from(round) * 4));
        server.signal("TERM");
        assert_eq!(server.exit_status().code(), Some(0));
        drop((clients, folder));
        let is_left = |pid: &u32| {
            std::fs::read(format!("/proc/{pid}/cmdline"))
                .is_ok_and(|line| line == format!("sleep\0{mark}\0").into_bytes())
        };
        wait_for("all commands to end", || {
            let processes = std::fs::read_dir("/proc").unwrap();
            !processes
                .filter_map(|entry| entry.ok()?.file_name().into_string().ok()?.parse().ok())
                .any(|pid| is_left(&pid))
        });
    }
}

#[test]
fn five_hundred_runs_leave_nothing() {
    let server = Server::start(&[]);
    let rest = server.at_rest();
    let clients: Vec<_> = (0..5)
        .map(|_| {
            let address = server.address.clone();
            std::thread::spawn(move || {
                for number in 0..100 {
                    let url = format!("http://{address}/run?command=echo+{number}");
                    let text = ureq::get(&url).call().unwrap().body_mut().read_to_string().unwrap();
                    assert_eq!(
                        output(&parse_events(text.as_bytes()), "stdout"),
                        format!("{number}\n")
                    );
                }
            })
        })
        .collect();
    clients.into_iter().for_each(|client| client.join().unwrap());
    server.comes_to_rest(rest);
}

#[test]
fn a_group_of_the_server_s_own_is_not_hit() {
    let mut command = binary();
    command.args(["--listen", "127.0.0.1:0"]).process_group(0);
    let server = Server::start_command(command);
    ends_all(&server, FAMILY, 2, drop);
    assert_eq!(outcome(&server.run("true")), "exited:0");
}

/// Whatever ends the server ends its commands, and what they started, even where it had no time to see to it.
#[test]
fn commands_do_not_outlive_a_server_that_is_killed() {
    let mut server = Server::start(&[]);
    let script = "sh -c 'trap \"\" TERM; sleep 1000 & echo $!; wait'";
    let mut begun: Vec<(Client, u32)> = (0..8).map(|_| server.begin(script)).collect();
    let mut pids = Vec::new();
    for (client, pid) in &mut begun {
        let text = client.read_until("\\n");
        let number = text.rsplit('"').find_map(|part| part.trim_end_matches("\\n").parse().ok());
        pids.extend([*pid, number.unwrap_or_else(|| panic!("{text}"))]);
    }
    server.run("true");
    let killed = Instant::now();
    server.signal("KILL");
    server.exit_status();
    pids.into_iter().for_each(is_gone);
    assert!(killed.elapsed() < Duration::from_secs(1));
}

#[test]
fn the_guardian_is_small_and_ends_with_the_server() {
    let mark = format!("MARK={}", std::process::id());
    let mut command = binary();
    command.args(["--listen", "127.0.0.1:0"]).env("MARK", &mark[5..]);
    let mut server = Server::start_command(command);
    // Whoever was started with the mark, and has it still.
    let marked = || -> Vec<(u32, String)> {
        let processes = std::fs::read_dir("/proc").unwrap().flatten();
        let pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        let has_mark = |pid: &u32| {
            let environment = std::fs::read(format!("/proc/{pid}/environ"));
            environment.is_ok_and(|it| it.split(|&byte| byte == 0).any(|it| it == mark.as_bytes()))
        };
        let name = |pid| std::fs::read_to_string(format!("/proc/{pid}/comm"));
        let named = pids.filter(has_mark).filter_map(|pid| Some((pid, name(pid).ok()?)));
        named.collect()
    };
    let pid = server.process.id();
    let mut others = Vec::new();
    wait_for("the guardian to take its name", || {
        others = marked();
        others.retain(|other| other.0 != pid);
        others.len() == 1 && others[0].1 == "sse-guardian\n"
    });
    let guardian = others[0].0;
    assert_ne!(stat_field(guardian, 1), Some(pid.to_string()));
    assert_ne!(stat_field(guardian, 3), stat_field(pid, 3));
    let memory = std::fs::read_to_string(format!("/proc/{guardian}/smaps_rollup")).unwrap();
    let private = memory.lines().filter(|line| line.starts_with("Private_"));
    let kilobytes =
        private.map(|line| line.split_whitespace().nth(1).unwrap().parse::<u32>().unwrap());
    assert!(kilobytes.sum::<u32>() < 300, "{memory}");
    server.signal("TERM");
    server.exit_status();
    wait_for("the guardian to end", || marked().is_empty());
}

/// How much a command can write to a client that does not read.
fn room_of_an_idle_client(server: &Server) -> u64 {
    let (_client, pid) = server.begin("head -c 100000000 /dev/zero");
    let written = || {
        let counts = std::fs::read_to_string(format!("/proc/{pid}/io")).unwrap();
        let mut lines = counts.lines();
        let line = lines.find_map(|line| line.strip_prefix("wchar: ")).unwrap();
        line.parse::<u64>().unwrap()
    };
    let mut before = 0;
    wait_for("the command to be held up", || {
        std::thread::sleep(Duration::from_millis(300));
        before == std::mem::replace(&mut before, written())
    });
    before
}

/// Waits until a command has exited, reaped or not.
fn has_exited(pid: u32) {
    wait_for("the command to exit", || stat_field(pid, 0).is_none_or(|state| state == "Z"));
}

/// The command has exited and its group is killed, while the last of its output is still in the pipe or in the server.
#[test]
fn a_client_that_pauses_gets_all_that_was_written() {
    let server = Server::start(&["--grace", "0.2"]);
    let room = room_of_an_idle_client(&server);
    for length in [room - 40_000, room - 100_000] {
        let (mut client, pid) = server.begin(&format!("head -c {length} /dev/zero"));
        has_exited(pid);
        std::thread::sleep(Duration::from_secs(1));
        let events = client.rest();
        assert_eq!(outcome(&events), "exited:0");
        let pieces = events.iter().filter(|event| event.event == "stdout");
        let escaped: usize = pieces.map(|event| event.data.matches("\\u0000").count()).sum();
        assert_eq!(escaped as u64, length);
    }
}

/// What the server's end has to say comes before `exit`, or not at all: where exactly the output stands makes no difference.
#[test]
fn nothing_follows_exit() {
    let room = room_of_an_idle_client(&Server::start(&[]));
    for left in [66_000, 74_000, 82_000, 90_000] {
        let server = Server::start(&["--grace", "1"]);
        let (mut client, pid) = server.begin(&format!("head -c {} /dev/zero", room - left));
        has_exited(pid);
        server.signal("TERM");
        server.logged(&["shutdown"]);
        std::thread::sleep(Duration::from_millis(300));
        let events = client.rest();
        assert_eq!(events.last().unwrap().event, "exit", "{left}");
    }
}

/// It is the client that pauses then, not the output of what the command left running.
#[test]
fn leftovers_are_not_taken_for_quiet_while_the_client_pauses() {
    let server = Server::start(&["--grace", "20"]);
    let length = 20_000_000;
    let (mut client, pid) = server.begin(&format!("sh -c 'head -c {length} /dev/zero &'"));
    has_exited(pid);
    std::thread::sleep(Duration::from_secs(1));
    let events = client.rest();
    assert_eq!(outcome(&events), "exited:0");
    let data = &events.last().unwrap().data;
    assert!(data.contains(&format!("\"stdout_bytes\":{length}")), "{data}");
}
