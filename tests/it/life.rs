//! Section 6: what a command gets, and how it ends.

use crate::support::*;
use std::io::{BufRead, Read, Write};
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::{Duration, Instant};

#[test]
fn what_a_command_gets() {
    // Started by somebody who ignores signals and has set a variable.
    let mut command = binary_by_shell("trap '' CHLD INT TERM PIPE XFSZ");
    command.args(["--listen", "127.0.0.1:0"]).env("MARK", "there").current_dir("/usr");
    let ignoring = Server::start_command(command);
    let usual = Server::start(&[]);
    let run = |server: &Server, command: &str| output(&server.run(command), "stdout");
    assert_eq!(run(&ignoring, "sh -c 'pwd; echo $MARK'"), "/usr\nthere\n");
    // Numbers that are the same wherever this runs.
    let (int, pipe, term, hup, chld, xfsz) = (2, 13, 15, 1, 17, 25);
    let handled = [int, pipe, term, chld, xfsz];
    for (server, signals) in [(&ignoring, &handled[..]), (&usual, &[hup])] {
        let status = run(server, "cat /proc/self/status");
        let mask = |field| {
            let mut lines = status.lines();
            let line = lines.find_map(|line| line.strip_prefix(field)).unwrap();
            u64::from_str_radix(line.trim(), 16).unwrap()
        };
        assert_eq!(mask("SigBlk:"), 0);
        for signal in signals {
            assert_eq!(mask("SigIgn:") >> (signal - 1) & 1, 0, "{signal}");
        }
    }
    for signal in ["INT", "PIPE", "TERM"] {
        let events = ignoring.run(&format!("sh -c 'kill -{signal} $$'"));
        assert!(outcome(&events).starts_with("killed:"), "{events:?}");
    }
    assert_eq!(outcome(&usual.run("sh -c 'kill -HUP $$'")), "killed:1");
    assert_eq!(outcome(&ignoring.run("sh -c 'exit 3'")), "exited:3");
    let (client, pid) = usual.begin("sleep 1000");
    assert_eq!(stat_field(pid, GROUP), Some(pid.to_string()));
    assert_eq!(stat_field(pid, TERMINAL), Some("0".to_string()));
    drop(client);
    let input = run(&usual, "ls -l /proc/self/fd/0");
    assert!(input.contains("0 -> /dev/null"), "{input}");
    assert_eq!(outcome(&usual.run("sh -c '! read x'")), "exited:0");
}

/// Also while others are being started, and stream, and are fed.
#[test]
fn commands_get_no_descriptor_of_the_server_s() {
    let usual = descriptors_of_a_command();
    let server = Server::start(&[]);
    let _held: Vec<_> = (0..5).map(|_| server.begin("sleep 1000")).collect();
    let _fed: Vec<_> =
        (0..5).map(|_| server.begin_post("sleep 1000", "Content-Length: 10\r\n\r\n")).collect();
    let _idle: Vec<_> = (0..5).map(|_| server.connect()).collect();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..25 {
                    let events = server.run("ls /proc/self/fd");
                    assert_eq!(output(&events, "stdout"), usual);
                }
            });
        }
    });
}

#[test]
fn what_cannot_be_run_is_told_and_no_shell_tries_it() {
    let folder = Folder::new();
    let marker = folder.path("marker");
    let file = |name: &str, content: &[u8], mode: &str| {
        let path = folder.write(name, content);
        succeeds(Command::new("chmod").args([mode, &path]));
        path
    };
    let script = format!("touch {marker}\n");
    let headless = file("headless", script.as_bytes(), "755");
    let empty = file("empty", b"", "755");
    let plain = file("plain", format!("#!/bin/sh\n{script}").as_bytes(), "644");
    let uninterpreted = file("uninterpreted", b"#!/no/such/shell\n", "755");
    let binary = file("binary", b"\x7fELF\x02\x01\x01 no more", "755");
    let below_a_file = format!("{plain}/x");
    let long = "x".repeat(300);
    let circle = folder.path("circle");
    std::os::unix::fs::symlink(&circle, &circle).unwrap();
    let folders_path = folder.path("");
    // One that somebody is writing to.
    let busy = file("busy", &std::fs::read("/bin/true").unwrap(), "755");
    let _writer = std::fs::OpenOptions::new().append(true).open(&busy).unwrap();
    let server = Server::start(&[]);
    for (program, code) in [
        ("nonesuch", 127),
        ("/no/such/program", 127),
        (&below_a_file, 127),
        (&long, 127),
        (&uninterpreted, 127),
        (&headless, 126),
        (&empty, 126),
        (&plain, 126),
        (&binary, 126),
        (&circle, 126),
        (&folders_path, 126),
        (&busy, 126),
    ] {
        let events = server.run(program);
        assert_eq!(outcome(&events), format!("failed:{code}"), "{program}");
        let names: Vec<_> = events.iter().map(|event| event.event.as_str()).collect();
        assert_eq!(names, ["err", "exit"], "{program}");
    }
    assert!(!std::path::Path::new(&marker).exists());
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
    // It is SIGTERM that does it, and no heartbeat that brings it out.
    let server = Server::start(&["--grace", "1000", "--heartbeat", "1000"]);
    let rest = server.at_rest();
    let took = ends_all(&server, FAMILY, 2, drop);
    assert!(took < Duration::from_secs(5), "{took:?}");
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
    wait_for("the command to stop", || stat_field(pid, STATE).as_deref() == Some("T"));
    drop(client);
    is_gone(pid);
    server.logged(&["exit", "signal=15"]);
}

/// Without a grace period there is SIGKILL at once.
#[test]
fn no_grace_is_no_mercy() {
    let server = Server::start(&["--grace", "0"]);
    let (mut client, _) =
        server.begin("sh -c 'trap \"\" TERM; echo ready; while :; do sleep 0.1; done'");
    client.read_until("ready");
    server.session_has(2);
    drop(client);
    server.session_has(0);
    server.logged(&["exit", "out=gone", "signal=9"]);
}

/// Commands whose processes are of several groups, and how many each has. SIGTERM ends the first of them, not all.
fn families(folder: &Folder) -> Vec<(String, usize)> {
    let in_group = in_group(folder);
    let script = |name: &str, text: &str| format!("sh {}", folder.write(name, text));
    vec![
        ("sh -c 'timeout 1000 sleep 1000; :'".to_string(), 3),
        ("sh -c 'sleep 1000 & timeout 1000 timeout 999 sleep 1000 & wait'".to_string(), 5),
        // Found while its parent was there, which SIGTERM ends.
        (script("1", "timeout 1000 sh -c \"trap '' TERM; sleep 1000; :\"; :"), 4),
        // A group in a group, as job control makes them.
        (
            script(
                "2",
                &format!(
                    "sh {in_group} 0 'sleep 1000 & sh {in_group} 0 \"exec sleep 1000\" & wait' & wait"
                ),
            ),
            4,
        ),
        // It starts another one when it is told to end.
        (
            script(
                "3",
                &format!(
                    "sh {in_group} 0 'trap \"timeout 1000 sleep 1000 & timeout 1000 sleep 1000 &\" TERM; while :; do sleep 1000 & wait; done' & wait"
                ),
            ),
            3,
        ),
        // It does so, and ends at once itself.
        (
            script(
                "4",
                &format!(
                    "sh {in_group} 0 'trap \"sleep 1000 & exit\" TERM; while :; do sleep 1000 & wait; done' & wait"
                ),
            ),
            3,
        ),
    ]
}

fn begin_families(server: &Server, folder: &Folder) -> Vec<Client> {
    let families = families(folder);
    let begin = |(command, _): &(String, usize)| server.begin(command).0;
    let clients = families.iter().map(begin).collect();
    server.session_has(families.iter().map(|(_, count)| count).sum());
    clients
}

#[test]
fn a_hang_up_kills_descendants_of_other_groups() {
    let folder = Folder::new();
    let server = Server::start(&["--grace", "0.5"]);
    let rest = server.at_rest();
    let clients = begin_families(&server, &folder);
    drop(clients);
    server.session_has(0);
    server.comes_to_rest(rest);
    wait_for("all to be logged", || server.log().matches("out=gone").count() == 6);
}

#[test]
fn a_timeout_kills_descendants_of_other_groups() {
    let folder = Folder::new();
    let server = Server::start(&["--grace", "0.5", "--timeout", "4"]);
    let mut clients = begin_families(&server, &folder);
    for client in &mut clients {
        assert!(outcome(&client.rest()).starts_with("timeout:"));
    }
    server.session_has(0);
}

#[test]
fn a_stall_kills_descendants_of_other_groups() {
    let server = Server::start(&["--grace", "0.5", "--stall", "2"]);
    let (_client, _) = server.begin("sh -c 'timeout 1000 sleep 1000 & timeout 1000 yes; :'");
    server.session_has(5);
    server.session_has(0);
    server.logged(&["exit", "out=stalled"]);
}

/// SIGTERM reaches each of them, and SIGCONT those that are stopped: none has to wait for SIGKILL.
#[test]
fn descendants_of_other_groups_have_their_grace() {
    let folder = Folder::new();
    let in_group = in_group(&folder);
    let server = Server::start(&["--grace", "1000"]);
    // The leader stays until both are through: the kernel sends SIGHUP to a group that is stopped and alone.
    let script = folder.write(
        "script",
        format!(
            "cd {}; trap : TERM\n\
             sh {in_group} 0 'trap \"echo >one; exit\" TERM; echo >ready1; while :; do sleep 0.1; done' &\n\
             sh {in_group} 0 'trap \"echo >two; exit\" TERM; echo >ready2; kill -STOP $$; while :; do sleep 0.1; done' &\n\
             wait; wait; wait",
            folder.path("")
        ),
    );
    let (client, _) = server.begin(&format!("sh {script}"));
    let exists = |name| std::path::Path::new(&folder.path(name)).exists();
    wait_for("both groups", || {
        let mut session = server.session();
        session.retain(|&pid| stat_field(pid, STATE).as_deref() == Some("T"));
        exists("ready1") && exists("ready2") && session.len() == 1
    });
    drop(client);
    server.session_has(0);
    assert!(exists("one") && exists("two"));
}

/// The leader that dies at SIGTERM takes nobody's grace away, in its group or outside.
#[test]
fn descendants_have_their_grace_though_the_leader_has_none() {
    let folder = Folder::new();
    let server = Server::start(&["--grace", "20"]);
    let careful = |name: &str| {
        let done = folder.path(name);
        let script =
            format!("trap 'sleep 1; echo >{done}; exit' TERM; echo; while :; do sleep 0.1; done");
        (folder.write(&format!("{name}.sh"), script), done)
    };
    let (inside, inside_done) = careful("inside");
    let (outside, outside_done) = careful("outside");
    let inside = server.begin(&format!("sh -c 'sh {inside}; :'"));
    let outside = server.begin(&format!("sh -c 'timeout 1000 sh {outside}; :'"));
    // SIGHUP would end it at once: what the kernel sends to a group that has lost its leader's parent while it was stopped.
    let (alone, alone_done) = careful("alone");
    let alone = server.begin(&format!("sh -c 'sh {} 0 \"exec sh {alone}\"; :'", in_group(&folder)));
    for ((mut client, leader), done) in
        [(inside, inside_done), (outside, outside_done), (alone, alone_done)]
    {
        client.read_until("\\n");
        drop(client);
        is_gone(leader);
        wait_for("its descendant to end in its own way", || std::path::Path::new(&done).exists());
    }
    server.session_has(0);
}

/// Some are always between their fork and the group that they form when they are looked for.
#[test]
fn what_is_just_being_started_is_found() {
    let server = Server::start(&["--grace", "0.5"]);
    for _ in 0..5 {
        let (client, _) = server.begin("sh -c 'while :; do timeout 1000 sleep 1000 & done'");
        wait_for("many groups", || server.session().len() > 40);
        drop(client);
        server.session_has(0);
    }
}

/// A command that has moved into somebody else's group is ended, and whose group it is lives on.
#[test]
fn no_other_group_is_signalled() {
    let folder = Folder::new();
    let in_group = in_group(&folder);
    let stubborn = "trap \"\" TERM; sleep 1000; :";
    at_once(["exec sleep 1000", stubborn], |script| {
        let server = Server::start(&["--grace", "0.5"]);
        let (mut bystander, bystanders) = server.begin("sleep 1000");
        for group in [server.pid, bystanders] {
            let moved = || {
                let mut session = server.session();
                session.retain(|&pid| stat_field(pid, GROUP) == Some(group.to_string()));
                session.iter().any(|&pid| pid != bystanders)
            };
            // The leader itself, and then a child of it.
            for command in [
                format!("sh {in_group} {group} '{script}'"),
                format!("sh -c \"sh {in_group} {group} '{}'; :\"", script.replace('"', "\\\"")),
            ] {
                let (client, _) = server.begin(&command);
                wait_for("it to be in the other group", moved);
                drop(client);
                server.session_has(1);
                assert!(is_alive(bystanders) && server.is_alive());
            }
        }
        // The one whose group it was never noticed.
        signal_process(bystanders, "USR1");
        assert_eq!(outcome(&bystander.rest()), "killed:10");
    });
    // Nor by a timeout, which ends in the same way and frees the place.
    let limited = Server::start(&["--grace", "0.5", "--timeout", "1.5", "--max-commands", "1"]);
    let events = limited.run(&format!("sh {in_group} {} '{stubborn}'", limited.pid));
    assert_eq!(outcome(&events), "timeout:9");
    assert_eq!(outcome(&limited.run("true")), "exited:0");
    assert_eq!(limited.session(), [0; 0]);
}

/// Nobody can tell any more whose it is, until all of the session goes.
#[test]
fn what_lost_its_parent_in_a_group_of_its_own_lives_until_the_server_ends() {
    let folder = Folder::new();
    let script = folder.write("script", "(timeout 1000 sleep 1000 &)\necho; sleep 1000; :");
    at_once(["TERM", "KILL"], |signal| {
        let mut server = Server::start(&["--grace", "0.5"]);
        let (mut client, _) = server.begin(&format!("sh {script}"));
        client.read_until("\\n");
        server.session_has(4);
        drop(client);
        server.session_has(2);
        server.logged(&["exit", "out=gone"]);
        // The same where the command ends by itself.
        let events = server.run("sh -c 'timeout 1000 sleep 1000 & while [ $(cut -d\" \" -f5 /proc/$!/stat) = $$ ]; do :; done; exit 3'");
        assert_eq!(outcome(&events), "exited:3");
        assert_eq!(outcome(&server.run("true")), "exited:0");
        assert_eq!(server.session().len(), 4);
        signal_process(server.pid, signal);
        server.exit_status();
        assert_eq!(server.session(), [0; 0]);
    });
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
    // Plain text has no comments by which to find out.
    let mut client = server.connect();
    client.write(format!(
        "GET /run?command=sleep+1000 HTTP/1.1\r\nHost: {}\r\nAccept: text/plain\r\n\r\n",
        server.address
    ));
    assert_eq!(client.head().status, 200);
    client.half_close();
    server.logged(&["exit", "out=gone"]);
    assert!(server.children().is_empty());
}

/// But it does not keep a command alive for nobody.
#[test]
fn a_close_after_a_half_close_is_noticed_by_the_heartbeat() {
    let server = Server::start(&["--heartbeat", "1"]);
    let (client, pid) = server.begin("sleep 1000");
    client.half_close();
    std::thread::sleep(Duration::from_millis(1500));
    assert!(is_alive(pid));
    let start = Instant::now();
    drop(client);
    is_gone(pid);
    assert!(start.elapsed() < Duration::from_secs(6), "{:?}", start.elapsed());
    server.logged(&["exit", "out=gone"]);
}

/// Input that nobody reads stands before the end of the connection; something written brings it out.
#[test]
fn a_close_behind_unread_input_is_noticed_by_the_heartbeat() {
    let server = Server::start(&["--heartbeat", "1"]);
    for accept in ["text/event-stream", "text/plain"] {
        for command in ["sleep 1000", "sh -c 'exec <&-; exec sleep 1000'"] {
            let mut client = server.connect();
            client.write(format!(
                "POST {} HTTP/1.1\r\nHost: {}\r\nAccept: {accept}\r\nContent-Length: 100000000\r\n\r\n",
                run_target(command),
                server.address
            ));
            let socket = client.stream.get_ref();
            socket.set_write_timeout(Some(Duration::from_millis(300))).unwrap();
            // As much as goes in, where it is not read.
            let (mut socket, piece) = (client.stream.get_ref(), [b'x'; 65536]);
            for _ in 0..1000 {
                if socket.write(&piece).is_err() {
                    break;
                }
            }
            assert_eq!(client.head().status, 200);
            server.session_has(1);
            let pid = server.session()[0];
            let start = Instant::now();
            drop(client);
            is_gone(pid);
            assert!(start.elapsed() < Duration::from_secs(6), "{accept}: {:?}", start.elapsed());
        }
    }
    server.logged(&["exit", "out=gone"]);
}

/// To tell a half-close from an end takes a comment or two, not some for as long as the command runs.
#[test]
fn a_client_in_doubt_is_not_showered_with_comments() {
    let server = Server::start(&["--heartbeat", "1000"]);
    let half_closed = server.begin("sleep 1000").0;
    half_closed.half_close();
    let content = format!("Content-Length: 1000000\r\n\r\n{}", "x".repeat(300_000));
    let unread = server.begin_post("sleep 1000", &content).0;
    std::thread::sleep(Duration::from_secs(3));
    for mut client in [half_closed, unread] {
        let socket = client.stream.get_ref();
        socket.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
        let mut came: Vec<u8> = Vec::new();
        // Until there is nothing more for the moment.
        while let Ok(piece) = client.stream.fill_buf().map(<[u8]>::to_vec) {
            assert!(!piece.is_empty() && came.len() < 1000, "{came:?}");
            came.extend(&piece);
            client.stream.consume(piece.len());
        }
        let comments = came.split(|&byte| byte == b'\n');
        let comments = comments.filter(|&line| line == b":").count();
        assert!(comments <= 2, "{comments}");
    }
    assert_eq!(server.children().len(), 2);
}

#[test]
fn content_that_breaks_off_ends_the_command() {
    let server = Server::start(&["--grace", "1"]);
    let (mut client, _) = server.begin_post(
        "sh -c 'cat >/dev/null; echo whole; sleep 1000'",
        "Content-Length: 100\r\n\r\nten bytes.",
    );
    client.half_close();
    let events = client.rest();
    assert_eq!(events[0].event, "err");
    assert!(!outcome(&events).ends_with(":0"), "{events:?}");
    assert_eq!(output(&events, "stdout"), "");
    server.session_has(0);
    // By a reset, and the client gone.
    let (client, pid) = server.begin_post("sleep 1000", "Content-Length: 100\r\n\r\nten bytes.");
    drop(client);
    is_gone(pid);
}

#[test]
fn a_client_that_does_not_read_is_given_up() {
    let server = Server::start(&["--stall", "1", "--grace", "0.5"]);
    let (client, pid) = server.begin("yes");
    let mut plain = server.connect();
    plain.write(format!(
        "GET /run?command=yes HTTP/1.1\r\nHost: {}\r\nAccept: text/plain\r\n\r\n",
        server.address
    ));
    is_gone(pid);
    wait_for("both to be logged", || server.log().matches("out=stalled").count() == 2);
    assert_eq!(server.session(), [0; 0]);
    drop((client, plain));
    // Nor does it hold up a timeout, or the end.
    let mut server = Server::start(&["--timeout", "1", "--grace", "0.5"]);
    let (_client, pid) = server.begin("yes");
    is_gone(pid);
    let (_client, _) = server.begin("yes");
    let start = Instant::now();
    server.signal("TERM");
    assert_eq!(server.exit_status().code(), Some(0));
    assert!(start.elapsed() < Duration::from_secs(6), "{:?}", start.elapsed());
}

/// One that reads a little now and then has not stalled.
#[test]
fn a_client_that_reads_on_is_not_given_up() {
    let server = Server::start(&["--stall", "1"]);
    let (mut client, pid) = server.begin("yes");
    let mut buffer = vec![0; 400_000];
    for _ in 0..6 {
        std::thread::sleep(Duration::from_millis(400));
        client.stream.read_exact(&mut buffer).unwrap();
    }
    assert!(is_alive(pid));
    assert!(!server.log().contains("stalled"));
}

/// How much a process has written so far.
fn written(pid: u32) -> u64 {
    let counts = std::fs::read_to_string(format!("/proc/{pid}/io")).unwrap();
    let mut lines = counts.lines();
    let line = lines.find_map(|line| line.strip_prefix("wchar: ")).unwrap();
    line.parse().unwrap()
}

fn is_held_up(pid: u32) -> u64 {
    let mut before = 0;
    wait_for("the command to be held up", || {
        std::thread::sleep(Duration::from_millis(300));
        before == std::mem::replace(&mut before, written(pid))
    });
    before
}

#[test]
fn a_client_that_reads_slowly_slows_the_command() {
    let server = Server::start(&[]);
    let (mut client, pid) = server.begin("yes");
    is_held_up(pid);
    // It goes on where the client does.
    let mut buffer = vec![0; 1 << 20];
    for _ in 0..30 {
        client.stream.read_exact(&mut buffer).unwrap();
    }
    assert!(is_alive(pid));
    drop(client);
    is_gone(pid);
}

/// Whatever is printed, on both pipes, read slowly or not at all.
#[test]
fn memory_stays_bounded() {
    let commands = [
        ("yes", "text/event-stream"),
        ("yes", "text/plain"),
        ("cat /dev/zero", "text/event-stream"),
        ("cat /dev/urandom", "text/event-stream"),
        ("sh -c 'yes & cat /dev/zero >&2'", "text/event-stream"),
        ("sh -c 'yes \"$(printf %65536s)\" & cat /dev/urandom >&2'", "text/plain"),
        ("sh -c 'while :; do printf x; printf y >&2; done'", "text/event-stream"),
    ];
    for (command, accept) in commands {
        let server = Server::start(&[]);
        server.run("true");
        let before = server.memory();
        let mut clients: Vec<Client> = (0..8).map(|_| server.connect()).collect();
        for client in &mut clients {
            client.write(format!(
                "GET {} HTTP/1.1\r\nHost: {}\r\nAccept: {accept}\r\n\r\n",
                run_target(command),
                server.address
            ));
        }
        let mut most = 0;
        let mut buffer = vec![0; 1 << 18];
        for round in 0..10 {
            // Every other client reads.
            for client in clients.iter_mut().step_by(1 + round % 2) {
                client.stream.read_exact(&mut buffer[..1 << (10 + round % 9)]).unwrap();
            }
            std::thread::sleep(Duration::from_millis(50));
            most = most.max(server.memory());
        }
        let each = most.saturating_sub(before) / clients.len() as u64;
        assert!(each < 1024, "{each} kB for each of {command}");
    }
}

#[test]
fn what_a_command_leaves_running_may_print_for_a_moment() {
    // It is the pause that ends it.
    let server = Server::start(&["--grace", "1000"]);
    let start = Instant::now();
    once_of_three(|| {
        let events = server
            .run("sh -c '(sleep 0.1; echo late; sleep 0.1; echo later; sleep 1000) & echo $!'");
        let out = output(&events, "stdout");
        let mut lines = out.lines();
        is_gone(lines.next().unwrap().parse().unwrap());
        assert_eq!(outcome(&events), "exited:0");
        lines.eq(["late", "later"])
    });
    assert!(start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());
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
    let events = server
        .run("sh -c 'setsid sh -c \"while :; do echo \\$\\$; sleep 0.01; done\" & sleep 0.3'");
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

/// The heartbeat goes on while a command takes its time to end: what nobody reads holds nothing up.
#[test]
fn a_client_that_has_left_gets_no_heartbeat() {
    let server = Server::start(&["--heartbeat", "0.2", "--grace", "1"]);
    let (client, pid) = server.begin("sh -c \"trap '' TERM; while :; do sleep 0.1; done\"");
    drop(client);
    is_gone(pid);
    server.logged(&["Z exit ", &format!(" pid={pid} out=gone signal=9 ")]);
}

/// What `poll` has promised to a reader can be gone when it reads, and room for a feeder when it writes.
#[test]
fn a_command_that_meddles_with_its_own_pipes_holds_nothing_up() {
    let meddlers = [
        // It takes back what it printed.
        ("GET", "sh -c 'exec 3</proc/self/fd/1; while :; do echo x; read y <&3; done'"),
        ("GET", "sh -c 'exec 3</proc/self/fd/2; while :; do echo x >&2; read y <&3; done'"),
        ("GET", "sh -c 'dd if=/proc/self/fd/1 of=/dev/null bs=64k & while :; do echo x; done'"),
        // It fills its own input.
        ("POST", "sh -c 'exec 3>/proc/self/fd/0; yes >&3'"),
        ("POST", "sh -c 'exec 3>/proc/self/fd/0; yes >&3 & while read y; do :; done; wait'"),
    ];
    let begin = |server: &Server, method: &str, command: &str| {
        if method == "GET" {
            return server.begin(command);
        }
        let content = format!("Content-Length: 10000000\r\n\r\n{}", "x\n".repeat(150_000));
        server.begin_post(command, &content)
    };
    let limited = Server::start(&["--timeout", "1.5", "--grace", "0.5"]);
    let server = Server::start(&["--heartbeat", "1", "--grace", "0.5"]);
    let mut clients: Vec<_> =
        meddlers.map(|(method, command)| begin(&server, method, command)).into();
    let mut timed = meddlers.map(|(method, command)| begin(&limited, method, command).0);
    for ((_, command), client) in meddlers.iter().zip(&mut timed) {
        let outcome = outcome(&client.rest());
        assert!(outcome.starts_with("timeout:"), "{command}: {outcome}");
    }
    limited.session_has(0);
    for (_, pid) in &clients {
        assert!(is_alive(*pid));
    }
    let last = clients.split_off(3);
    drop(clients);
    wait_for("those to end whose clients have gone", || server.children().len() == last.len());
    let mut server = server;
    server.signal("TERM");
    assert_eq!(server.exit_status().code(), Some(0));
    assert_eq!(server.session(), [0; 0]);
}

/// It takes the room for which the feeder was woken, and then falls silent: among so many, some hit the moment.
#[test]
fn a_command_that_fills_its_own_input_is_timed_all_the_same() {
    let server = Server::start(&["--timeout", "2", "--grace", "0.5"]);
    let content = format!("Content-Length: 10000000\r\n\r\n{}", "x".repeat(1_500_000));
    at_once(0..40, |number| {
        let read = format!("dd bs=4096 count={} of=/dev/null status=none", 200 + number);
        let script = format!("exec 3>/proc/self/fd/0; yes >&3 & yes >&3 & {read}; sleep 1000");
        let (mut client, _) = server.begin_post(&format!("sh -c '{script}'"), &content);
        assert!(outcome(&client.rest()).starts_with("timeout:"));
    });
    server.session_has(0);
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

/// From the signal on, nothing is started; not in the backlog, not on a connection that was open before.
#[test]
fn a_server_that_ends_accepts_nobody() {
    let folder = Folder::new();
    let marker = folder.path("marker");
    let mut server = Server::start(&["--grace", "1.5"]);
    let (mut client, _) =
        server.begin("sh -c 'trap \"\" TERM; echo ready; while :; do sleep 0.1; done'");
    client.read_until("ready");
    server.signal("TERM");
    client.read_until("event: err");
    std::thread::sleep(Duration::from_millis(300));
    if let Ok(stream) = std::net::TcpStream::connect(&server.address) {
        let mut late = Client::of(stream);
        late.write(format!(
            "GET {} HTTP/1.1\r\nHost: {}\r\n\r\n",
            run_target(&format!("touch {marker}")),
            server.address
        ));
        let mut answer = Vec::new();
        let _ = late.stream.read_to_end(&mut answer);
        assert!(!answer.starts_with(b"HTTP/1.1 200"));
    }
    assert_eq!(server.exit_status().code(), Some(0));
    assert!(!std::path::Path::new(&marker).exists());
}

#[test]
fn a_signal_amid_forty_spawns_leaves_nothing() {
    at_once(0..5, |round| {
        let mut server = Server::start(&["--grace", "1"]);
        let clients: Vec<_> = (0..40)
            .map(|_| {
                let mut client = server.connect();
                client.write(format!(
                    "GET /run?command=sleep+1000 HTTP/1.1\r\nHost: {}\r\n\r\n",
                    server.address
                ));
                client
            })
            .collect();
        std::thread::sleep(Duration::from_millis(round * 4));
        server.signal("TERM");
        assert_eq!(server.exit_status().code(), Some(0));
        assert_eq!(server.session(), [0; 0]);
        drop(clients);
    });
}

#[test]
fn five_hundred_runs_leave_nothing() {
    let server = Server::start(&[]);
    let rest = server.at_rest();
    std::thread::scope(|scope| {
        for _ in 0..5 {
            scope.spawn(|| {
                for number in 0..100 {
                    let url = format!("http://{}/run?command=echo+{number}", server.address);
                    let text = ureq::get(&url).call().unwrap().body_mut().read_to_string().unwrap();
                    assert_eq!(
                        output(&parse_events(text.as_bytes()), "stdout"),
                        format!("{number}\n")
                    );
                }
            });
        }
    });
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

/// For what a busy host may spoil, where a command itself pauses for longer than it is told to.
fn once_of_three(mut attempt: impl FnMut() -> bool) {
    assert!((0..3).any(|_| attempt()));
}

/// How much a command can write to a client that does not read.
fn room_of_an_idle_client(server: &Server) -> u64 {
    let (_client, pid) = server.begin("head -c 100000000 /dev/zero");
    is_held_up(pid)
}

/// Waits until a command has exited, reaped or not.
fn has_exited(pid: u32) {
    wait_for("the command to exit", || stat_field(pid, STATE).is_none_or(|state| state == "Z"));
}

/// The command has exited and its group is killed, while the last of its output is still in the pipe or in the server.
#[test]
fn a_client_that_pauses_gets_all_that_was_written() {
    let server = Server::start(&["--grace", "0.2"]);
    let room = room_of_an_idle_client(&server);
    at_once([room - 100_000, room - 140_000], |length| {
        let (mut client, pid) = server.begin(&format!("head -c {length} /dev/zero"));
        has_exited(pid);
        std::thread::sleep(Duration::from_secs(1));
        let events = client.rest();
        assert_eq!(outcome(&events), "exited:0");
        let pieces = events.iter().filter(|event| event.event == "stdout");
        let escaped: usize = pieces.map(|event| event.data.matches("\\u0000").count()).sum();
        assert_eq!(escaped as u64, length);
    });
}

/// What the server's end has to say comes before `exit`, or not at all: where exactly the output stands makes no difference.
#[test]
fn nothing_follows_exit() {
    let room = room_of_an_idle_client(&Server::start(&[]));
    let complete = AtomicUsize::new(0);
    at_once([66_000, 74_000, 82_000, 90_000], |left| {
        let server = Server::start(&["--grace", "1"]);
        let (mut client, pid) = server.begin(&format!("head -c {} /dev/zero", room - left));
        has_exited(pid);
        server.signal("TERM");
        server.logged(&["shutdown"]);
        std::thread::sleep(Duration::from_millis(150));
        let mut content = Vec::new();
        // A client that pauses for too long is cut off: one that shares its processor may.
        let ended = loop {
            match client.chunk() {
                Some(chunk) if chunk.is_empty() => break true,
                Some(chunk) => content.extend(chunk),
                None => break false,
            }
        };
        let events = parse_events(&content);
        let exit = events.iter().position(|event| event.event == "exit");
        assert!(!ended || exit == Some(events.len() - 1), "{left}");
        assert!(exit.is_none_or(|place| place == events.len() - 1), "{left}");
        complete.fetch_add(usize::from(ended), SeqCst);
    });
    assert!(complete.into_inner() > 0);
}

/// Not even a comment by which a client that has finished sending is asked whether it is there: the first look at it
/// comes after a tenth of a second, about when these commands end.
#[test]
fn nothing_follows_the_last_chunk() {
    let server = Server::start(&[]);
    at_once(0..12, |thread| {
        for round in 0..40 {
            let millis = 88.0 + 0.5 * f64::from((round * 7 + thread) % 30);
            let mut client = server.connect();
            let (target, host) =
                (run_target(&format!("sleep {}", millis / 1000.0)), &server.address);
            client.write(format!("GET {target} HTTP/1.1\r\nHost: {host}\r\n\r\n"));
            client.half_close();
            client.head();
            client.rest();
            assert!(client.is_closed(), "{millis} ms");
        }
    });
}

/// It is the client that pauses then, not the output of what the command left running.
#[test]
fn leftovers_are_not_taken_for_quiet_while_the_client_pauses() {
    let server = Server::start(&["--grace", "20"]);
    let length = 5_000_000;
    let (mut client, pid) = server.begin(&format!("sh -c 'head -c {length} /dev/zero &'"));
    has_exited(pid);
    std::thread::sleep(Duration::from_secs(1));
    let events = client.rest();
    assert_eq!(outcome(&events), "exited:0");
    let data = &events.last().unwrap().data;
    assert!(data.contains(&format!("\"stdout_bytes\":{length}")), "{data}");
}

/// Nor while the server itself gets no processor time, as on a host that is busy or was suspended.
#[test]
fn leftovers_are_not_taken_for_quiet_while_the_server_pauses() {
    let server = Server::start(&["--grace", "20"]);
    let lines = "i=0; while [ $i -lt 40 ]; do echo $i; i=$((i+1)); sleep 0.05; done";
    let expected: String = (0..40).map(|number| format!("{number}\n")).collect();
    once_of_three(|| {
        let (mut client, pid) = server.begin(&format!("sh -c '({lines}) &'"));
        has_exited(pid);
        let mut printed = parse_events(client.read_until("\\n").as_bytes());
        while !printed.iter().any(|event| event.event == "exit") && printed.len() < 30 {
            signal_process(server.pid, "STOP");
            std::thread::sleep(Duration::from_millis(400));
            signal_process(server.pid, "CONT");
            std::thread::sleep(Duration::from_millis(100));
            // Another line, at least, by which the quiet is over; or the end, which is too early.
            printed.extend(parse_events(client.read_until("data: ").as_bytes()));
        }
        printed.extend(client.rest());
        assert_eq!(outcome(&printed), "exited:0");
        output(&printed, "stdout") == expected
    });
}

/// What was found before is killed after the grace period only if it is still the same process: here its number is
/// given to another one in between.
#[test]
#[ignore = "needs root and util-linux, and a kernel that lets numbers be chosen"]
fn root_a_number_that_was_given_again_is_not_hit() {
    let mut command = Command::new("unshare");
    command.args(["--pid", "--fork", "--kill-child", "--mount-proc"]);
    command.args(program());
    command.args(["--listen", "127.0.0.1:0", "--grace", "5"]);
    let server = Server::start_below(command, 1);
    // It outlives SIGTERM; its child in another group does not, and is reaped.
    let (mut client, _) = server.begin(
        "sh -c 'trap \"\" TERM; timeout 1000 sleep 1000 & echo $!; sleep 1000 & wait; wait'",
    );
    let printed = parse_events(client.read_until("\\n").as_bytes());
    let number: u32 = output(&printed, "stdout").trim().parse().unwrap();
    server.session_has(4);
    let leader = server.children()[0];
    drop(client);
    wait_for("the number to be free", || children_of(leader).len() == 1);
    // In the server's session, by a group of its own and no child of that command.
    let events = server.run(&format!(
        "sh -c 'echo {} >/proc/sys/kernel/ns_last_pid; (exec timeout 1000 sleep 1000 >/dev/null 2>&1) & echo $!; sleep 0.5'",
        number - 1
    ));
    assert_eq!(output(&events, "stdout"), format!("{number}\n"));
    server.session_has(4);
    server.logged(&["exit", "out=gone", "signal=9"]);
    assert_eq!(server.session().len(), 2);
}

/// A client that does not read, and for which `exit` waits in the server: its command is reaped. How much is to be
/// printed for that is tried, since what the system holds of it differs.
fn client_that_keeps_exit_waiting(server: &Server) -> (Client, u32) {
    let mut length = room_of_an_idle_client(&Server::start(&[])) - 200_000;
    for _ in 0..100 {
        wait_for("the last one to be reaped", || server.children().is_empty());
        let (client, pid) = server.begin(&format!("head -c {length} /dev/zero"));
        let start = Instant::now();
        while !server.children().is_empty() && start.elapsed() < Duration::from_secs(1) {
            std::thread::sleep(Duration::from_millis(10));
        }
        let is_reaped = server.children().is_empty();
        std::thread::sleep(Duration::from_millis(200));
        if !is_reaped {
            length -= 17_000;
        } else if server.log().contains(&format!(" pid={pid} out=")) {
            length += 11_000;
        } else {
            return (client, pid);
        }
    }
    panic!("no length keeps exit waiting");
}

/// Nor is a group whose leader was reaped, when the client leaves while `exit` waits for it.
#[test]
#[ignore = "needs root and util-linux, and a kernel that lets numbers be chosen"]
fn root_a_group_that_got_the_number_of_a_reaped_one_is_not_hit() {
    let mut command = Command::new("unshare");
    command.args(["--pid", "--fork", "--kill-child", "--mount-proc"]);
    command.args(program());
    command.args(["--listen", "127.0.0.1:0"]);
    let server = Server::start_below(command, 1);
    let (client, number) = client_that_keeps_exit_waiting(&server);
    // On one connection, and once this command's readers are there: no other thread takes the number.
    let number_before = number - 1;
    let choose = format!("sh -c 'sleep 0.5; echo {number_before} >/proc/sys/kernel/ns_last_pid'");
    let (mut bystander, _) = server.begin(&choose);
    assert_eq!(outcome(&bystander.rest()), "exited:0");
    bystander.write(format!(
        "GET {} HTTP/1.1\r\nHost: {}\r\n\r\n",
        run_target("sleep 1000"),
        server.address
    ));
    assert_eq!(bystander.started(), number);
    drop(client);
    server.logged(&["exit", &format!(" pid={number} "), "out=gone"]);
    // Time enough for a signal to arrive, and be told.
    std::thread::sleep(Duration::from_millis(300));
    signal_process(server.children()[0], "USR1");
    assert_eq!(outcome(&bystander.rest()), "killed:10");
}
