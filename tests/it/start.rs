//! Section 1: options, errors, the readiness line, Unix sockets.

use crate::support::*;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Command, Stdio};

/// What the program says and its exit status, where it does not serve.
fn refused(options: &[&str], variable: Option<&str>) -> (i32, String, String) {
    let mut command = binary();
    command.args(options).stdin(Stdio::null());
    variable.map(|token| command.env("SSECOMMANDER_TOKEN", token));
    let output = command.output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
}

#[test]
fn wrong_options_are_named_in_one_line() {
    let table: &[(&[&str], &str)] = &[
        (&["--nope"], "--nope"),
        (&["extra"], "extra"),
        (&["--listen"], "--listen"),
        (&["--listen="], "--listen"),
        (&["--timeout", "soon"], "--timeout"),
        (&["--stall=0"], "--stall"),
        (&["--heartbeat", "0"], "--heartbeat"),
        (&["--grace", "-1"], "--grace"),
        (&["--timeout", "31536001"], "--timeout"),
        (&["--max-connections", "none"], "--max-connections"),
        (&["--allow", "echo 'x"], "--allow"),
        (&["--verbose=yes"], "--verbose"),
        (&["--allow-origin", "ops.example"], "--allow-origin"),
    ];
    for (options, name) in table {
        let (status, stdout, stderr) = refused(options, None);
        assert_eq!(
            (status, stdout.as_str(), stderr.lines().count()),
            (2, "", 1),
            "{options:?} {stderr}"
        );
        assert!(stderr.contains(name), "{stderr}");
    }
}

#[test]
fn what_cannot_be_had_is_named_in_one_line() {
    let folder = Folder::new();
    let empty = folder.write("empty", "\nsecret\n");
    let file = folder.write("file", "");
    let nowhere = format!("unix:{}", folder.path("no/such/folder"));
    let on_file = format!("unix:{file}");
    let taken = Server::start(&[]);
    let table: &[(&[&str], &str)] = &[
        (&["--listen", &taken.address], &taken.address),
        (&["--listen", "0.0.0.0:0"], "--token-file"),
        (&["--listen", "[::]:0"], "--token-file"),
        (&["--allow-origin", "*"], "--token-file"),
        (&["--token-file", "/no/such/file"], "/no/such/file"),
        (&["--token-file", &empty], "empty"),
        (&["--listen", &nowhere], "no/such/folder"),
        (&["--listen", &on_file], "no socket"),
    ];
    for (options, name) in table {
        let (status, stdout, stderr) = refused(options, None);
        assert_eq!(
            (status, stdout.as_str(), stderr.lines().count()),
            (1, "", 1),
            "{options:?} {stderr}"
        );
        assert!(stderr.contains(name), "{stderr}");
    }
    assert_eq!(refused(&[], Some("")).0, 1);
    assert_eq!(refused(&["--token-file", &file], Some("secret")).0, 2);
    assert!(std::fs::metadata(file).unwrap().is_file());
}

#[test]
fn help_and_version_go_to_stdout() {
    let (status, help, stderr) = refused(&["--help"], None);
    assert_eq!((status, stderr.as_str()), (0, ""));
    let options = "--listen --allow --token-file --no-token --allow-origin --max-connections --timeout --grace --heartbeat --stall --verbose --help --version -l -v -h -V SSECOMMANDER_TOKEN";
    for option in options.split(' ') {
        assert!(help.contains(option), "{option}");
    }
    assert_eq!(refused(&["-h"], None).1, help);
    let version = format!("ssecommander {}\n", env!("CARGO_PKG_VERSION"));
    assert_eq!(refused(&["-V"], None), (0, version.clone(), String::new()));
    assert_eq!(refused(&["--version"], None).1, version);
}

#[test]
fn listens_where_it_is_told() {
    for listen in ["0", "127.0.0.1:0", "[::1]:0", "127.3.2.1:0"] {
        let mut command = binary();
        command.arg(format!("--listen={listen}"));
        let server = Server::start_command(command);
        assert!(!server.address.ends_with(":0"));
        assert_eq!(outcome(&server.run("true")), "exited:0", "{listen}");
    }
}

#[test]
fn closed_streams_do_not_stop_it() {
    let mut command = Command::new("sh");
    let folder = Folder::new();
    let socket = folder.path("socket");
    command.args(["-c", "exec \"$0\" --listen \"unix:$1\" >&- 2>&-", BINARY, &socket]);
    let mut process = command.spawn().unwrap();
    wait_for("the socket", || UnixStream::connect(&socket).is_ok());
    for _ in 0..3 {
        let response = unix_request(
            &socket,
            "GET /run?command=sh+-c+'echo+x;ls+/proc/self/fd' HTTP/1.0\r\n\r\n",
        );
        assert!(
            response.contains("\"out\":\"x\\n") && response.contains("event: exit"),
            "{response}"
        );
        // Standard streams, and the one that ls opens.
        assert!(
            response.contains("\\n0\\n1\\n2\\n3\\n") || response.contains("\"0\\n1\\n2\\n3\\n"),
            "{response}"
        );
    }
    signal_process(process.id(), "TERM");
    assert!(process.wait().unwrap().success());
}

fn unix_request(socket: &str, request: &str) -> String {
    let mut stream = UnixStream::connect(socket).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.write_all(request.as_bytes()).unwrap();
    let mut response = String::new();
    stream.read_to_string(&mut response).unwrap();
    response
}

fn start_on_socket(socket: &str, options: &[&str]) -> Server {
    let mut command = binary();
    command.args(["--listen", &format!("unix:{socket}")]);
    command.args(options);
    Server::start_command(command)
}

#[test]
fn a_unix_socket_is_the_owner_s_alone_and_goes_with_the_server() {
    let folder = Folder::new();
    let socket = folder.path("socket");
    let mut server = start_on_socket(&socket, &[]);
    assert_eq!(server.address, socket);
    assert_eq!(std::fs::metadata(&socket).unwrap().permissions().mode() & 0o777, 0o600);
    let request =
        "GET /run?command=echo+hi HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n";
    assert!(unix_request(&socket, request).contains("\"out\":\"hi\\n\""));
    let foreign =
        "GET /run?command=echo+hi HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n";
    assert!(unix_request(&socket, foreign).starts_with("HTTP/1.1 421 "));
    server.logged(&["run peer=unix", "command=\"echo hi\""]);
    // On a socket where a server answers nothing is replaced.
    let (status, _, stderr) = refused(&["--listen", &format!("unix:{socket}")], None);
    assert_eq!(status, 1, "{stderr}");
    server.signal("TERM");
    assert!(server.exit_status().success());
    assert!(!std::path::Path::new(&socket).exists());
}

#[test]
fn a_hang_up_on_a_unix_socket_kills() {
    let folder = Folder::new();
    let socket = folder.path("socket");
    let server = start_on_socket(&socket, &[]);
    let mut stream = UnixStream::connect(&socket).unwrap();
    stream.write_all(b"GET /run?command=sleep+1000 HTTP/1.1\r\nHost: localhost\r\n\r\n").unwrap();
    let line = server.logged(&["run peer=unix"]);
    let pid = line.split("pid=").nth(1).unwrap().split(' ').next().unwrap().parse().unwrap();
    drop(stream);
    is_gone(pid);
    server.logged(&["exit peer=unix", "out=gone"]);
}

/// There is no TCP to give the client up.
#[test]
fn a_stall_on_a_unix_socket_kills() {
    let folder = Folder::new();
    let socket = folder.path("socket");
    let server = start_on_socket(&socket, &["--stall", "1"]);
    let mut stream = UnixStream::connect(&socket).unwrap();
    stream.write_all(b"GET /run?command=yes HTTP/1.1\r\nHost: localhost\r\n\r\n").unwrap();
    server.logged(&["exit peer=unix", "out=stalled"]);
    assert!(server.children().is_empty());
}

/// Nothing follows an answer that breaks off, though more was asked for.
#[test]
fn an_answer_that_is_not_read_is_the_last() {
    let folder = Folder::new();
    let socket = folder.path("socket");
    let server = start_on_socket(&socket, &["--stall", "1"]);
    let mut stream = UnixStream::connect(&socket).unwrap();
    let request = "GET / HTTP/1.1\r\nHost: localhost\r\n\r\n";
    stream.write_all(request.repeat(200).as_bytes()).unwrap();
    wait_for("the connection's thread", || server.threads() == 2);
    wait_for("the connection's end", || server.threads() == 1);
    let mut answers = Vec::new();
    // Closing with requests unread sends a reset.
    let _ = stream.read_to_end(&mut answers);
    let answers = String::from_utf8(answers).unwrap();
    let answers = answers.split("HTTP/1.1 200 OK\r\n").skip(1);
    let lengths: Vec<_> = answers.map(str::len).collect();
    let (first, last) = (lengths[0], lengths[lengths.len() - 1]);
    assert!(lengths.len() < 200 && last <= first, "{lengths:?}");
    let whole = &lengths[..lengths.len() - 1];
    assert!(whole.iter().all(|&length| length == first));
}

#[test]
fn a_dead_server_s_socket_is_replaced() {
    let folder = Folder::new();
    let socket = folder.path("socket");
    drop(UnixListener::bind(&socket).unwrap());
    let mut server = start_on_socket(&socket, &[]);
    server.process.kill().unwrap();
    server.process.wait().unwrap();
    assert!(std::path::Path::new(&socket).exists());
    let server = start_on_socket(&socket, &[]);
    assert!(unix_request(&server.address, "GET / HTTP/1.0\r\n\r\n").starts_with("HTTP/1.1 200 "));
}

#[test]
fn somebody_else_s_socket_is_not_removed() {
    let folder = Folder::new();
    let socket = folder.path("socket");
    let mut server = start_on_socket(&socket, &[]);
    std::fs::remove_file(&socket).unwrap();
    let _other = UnixListener::bind(&socket).unwrap();
    server.signal("TERM");
    assert!(server.exit_status().success());
    assert!(std::path::Path::new(&socket).exists());
}
