//! Section 1: options, failures to start, the readiness line, streams that are closed or full.

use crate::support::*;
use std::ffi::OsStr;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::ffi::OsStrExt;
use std::process::{Command, Stdio};

/// What the program says and its exit status, where it does not serve.
fn refused(options: &[&str]) -> (i32, String, String) {
    output_of(binary().args(options))
}

/// One line on stderr that has all of `parts`, nothing on stdout.
fn is_refused(command: &mut Command, status: i32, parts: &[&str]) {
    let (code, stdout, stderr) = output_of(command);
    assert_eq!(
        (code, stdout.as_str(), stderr.lines().count()),
        (status, "", 1),
        "{command:?} {stderr}"
    );
    for part in parts {
        assert!(stderr.contains(part), "{part:?}: {command:?} {stderr}");
    }
}

#[test]
fn wrong_options_are_named_with_what_is_right() {
    let table: &[(&[&str], &[&str])] = &[
        (&["--nope"], &["--nope", "--help"]),
        (&["-x"], &["-x", "--help"]),
        (&["extra"], &["extra"]),
        (&[""], &[]),
        (&["--list", "0"], &["--list"]),
        (&["--max-connections", "5"], &["--max-connections"]),
        (&["--listen"], &["--listen"]),
        (&["-l"], &["PORT"]),
        (&["--listen="], &["--listen", "PORT"]),
        (&["--listen", "127.0.0.1"], &["--listen", "PORT"]),
        (&["--listen", "65536"], &["--listen", "PORT"]),
        (&["--listen", "+80"], &["--listen", "PORT"]),
        (&["--listen", "127.0.0.1:+80"], &["--listen", "PORT"]),
        (&["--listen", "example.com:80"], &["--listen", "PORT"]),
        (&["--listen", "::1:0"], &["--listen", "PORT"]),
        (&["--listen", "unix:/tmp/socket"], &["--listen", "PORT"]),
        (&["--listen", "0", "--listen", "0"], &["--listen"]),
        (&["-l", "0", "--listen=127.0.0.1:0"], &["--listen"]),
        (&["--timeout", "soon"], &["--timeout"]),
        (&["--timeout", ""], &["--timeout"]),
        (&["--timeout", "nan"], &["--timeout"]),
        (&["--timeout", "inf"], &["--timeout"]),
        (&["--timeout", "+5"], &["--timeout"]),
        (&["--timeout", "0x5"], &["--timeout"]),
        (&["--timeout", " 5"], &["--timeout"]),
        (&["--timeout", "5s"], &["--timeout"]),
        (&["--timeout", "31536001"], &["--timeout"]),
        (&["--timeout", "31536000.1"], &["--timeout"]),
        (&["--timeout", "99999999999999999999999"], &["--timeout"]),
        (&["--grace", "-1"], &["--grace"]),
        (&["--grace", "31536001"], &["--grace"]),
        (&["--heartbeat", "0"], &["--heartbeat"]),
        (&["--heartbeat", "0.0"], &["--heartbeat"]),
        (&["--heartbeat=31536001"], &["--heartbeat"]),
        (&["--stall=0"], &["--stall"]),
        (&["--stall=-0.5"], &["--stall"]),
        (&["--max-commands", "none"], &["--max-commands"]),
        (&["--max-commands", "+5"], &["--max-commands"]),
        (&["--max-commands", "-5"], &["--max-commands"]),
        (&["--max-commands", "0.5"], &["--max-commands"]),
        (&["--max-commands="], &["--max-commands"]),
        (&["--max-commands", "99999999999999999999999"], &["--max-commands"]),
        (&["--allow", "echo 'x"], &["--allow"]),
        (&["--allow", "echo 'x *"], &["--allow"]),
        (&["--allow", ""], &["--allow"]),
        (&["--allow", "  "], &["--allow"]),
        (&["--allow"], &["--allow"]),
        (&["--verbose=yes"], &["--verbose"]),
        (&["--verbose="], &["--verbose"]),
        (&["--no-token=1"], &["--no-token"]),
        (&["--help=yes"], &["--help"]),
        (&["--version="], &["--version"]),
        (&["--allow-origin", "ops.example"], &["--allow-origin", "https://"]),
        (&["--allow-origin", "https://ops.example/page"], &["--allow-origin", "https://"]),
        (&["--token-file"], &["--token-file"]),
        // What could be taken for a success stands alone.
        (&["-h", "-v"], &["-h"]),
        (&["-v", "-h"], &["-h"]),
        (&["-V", "--listen", "0"], &["-V"]),
        (&["--help", "--version"], &["--"]),
        (&["--help", "--help"], &["--help"]),
        (&["--help", "extra"], &["--help"]),
        // Quotes that were forgotten.
        (&["--allow", "df", "-h"], &["-h", "quote"]),
        (&["--allow=df", "--help"], &["--help", "quote"]),
        (&["--allow", "uname", "-V"], &["-V", "quote"]),
        (&["--allow", "ls", "-l"], &["-l", "quote"]),
        (&["--allow", "ls", "-l", "/tmp"], &["quote"]),
        (&["--allow", "ls", "/tmp"], &["/tmp", "quote"]),
        (&["--allow", "ls", "-a"], &["-a", "quote"]),
        (&["--allow", "ls", "--color"], &["--color", "quote"]),
    ];
    for (options, parts) in table {
        is_refused(binary().args(*options), 2, parts);
    }
}

/// A byte that is no character would otherwise name another file, or admit another command.
#[test]
fn arguments_that_are_not_text_are_wrong() {
    let folder = Folder::new();
    let file = folder.write("token-\u{fffd}", "secret\n");
    let broken = file.replace('\u{fffd}', "\u{1}");
    for (options, value) in [
        (&["--listen=0", "--allow"][..], "echo \u{1}"),
        (&["--listen=0", "--token-file"], broken.as_str()),
        (&["--listen=0"], "--allow=echo \u{1}"),
        (&["--listen=0"], "\u{1}"),
        (&["--listen"], "\u{1}0"),
    ] {
        let bytes = value.bytes();
        let bytes: Vec<u8> = bytes.map(|byte| if byte == 1 { 0xff } else { byte }).collect();
        let mut command = binary();
        command.args(options).arg(OsStr::from_bytes(&bytes));
        is_refused(&mut command, 2, &[]);
    }
}

#[test]
fn what_cannot_be_had_is_named_in_one_line() {
    let folder = Folder::new();
    let empty = folder.write("empty", "\nsecret\n");
    let nothing = folder.write("nothing", "");
    let taken = Server::start(&[]);
    let table: &[(&[&str], &str)] = &[
        (&["--listen", &taken.address], &taken.address),
        (&["--listen", "192.0.2.1:0"], "192.0.2.1"),
        (&["--listen", "0.0.0.0:0"], "--token-file"),
        (&["--listen", "[::]:0"], "--token-file"),
        (&["--allow-origin", "*"], "--token-file"),
        (&["--allow-origin", "https://ops.example", "--allow-origin=*"], "--token-file"),
        (&["--token-file", "/no/such/file"], "/no/such/file"),
        (&["--token-file", "/"], "/"),
        (&["--token-file", &empty], "empty"),
        (&["--token-file", &nothing], "empty"),
    ];
    for (options, name) in table {
        is_refused(binary().args(*options), 1, &[name]);
    }
}

#[test]
fn help_and_version_go_to_stdout() {
    let (status, help, stderr) = refused(&["--help"]);
    assert_eq!((status, stderr.as_str()), (0, ""));
    let options = "--listen --allow --token-file --no-token --allow-origin --max-commands --timeout --grace --heartbeat --stall --verbose --help --version -l -v -h -V";
    for option in options.split(' ') {
        assert!(help.contains(option), "{option}");
    }
    for gone in ["SSECOMMANDER_TOKEN", "unix:", "--max-connections"] {
        assert!(!help.contains(gone), "{gone}");
    }
    assert_eq!(refused(&["-h"]), (0, help, String::new()));
    let version = format!("ssecommander {}\n", env!("CARGO_PKG_VERSION"));
    assert_eq!(refused(&["-V"]), (0, version.clone(), String::new()));
    assert_eq!(refused(&["--version"]), (0, version, String::new()));
}

#[test]
fn listens_where_it_is_told() {
    for (listen, address) in [
        (&["--listen", "0"][..], "127.0.0.1:"),
        (&["--listen=127.0.0.1:0"], "127.0.0.1:"),
        (&["-l", "localhost:0"], "127.0.0.1:"),
        (&["--listen=[::1]:0"], "[::1]:"),
        (&["-l", "127.3.2.1:0"], "127.3.2.1:"),
    ] {
        let mut command = binary();
        command.args(listen);
        let server = Server::start_command(command);
        assert!(server.address.starts_with(address), "{}", server.address);
        assert!(!server.address.ends_with(":0"));
        assert_eq!(outcome(&server.run("true")), "exited:0", "{listen:?}");
    }
    // A port by its number alone.
    let address = free_address();
    let port = address.rsplit(':').next().unwrap();
    let mut command = binary();
    command.args(["--listen", port]);
    assert_eq!(Server::start_command(command).address, format!("127.0.0.1:{port}"));
}

/// The port may be somebody else's at the moment: then it is that one which is refused.
#[test]
fn listens_on_port_3000_where_nothing_is_told() {
    let mut command = binary();
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut process = command.spawn().unwrap();
    let mut line = String::new();
    let mut stdout = BufReader::new(process.stdout.take().unwrap());
    stdout.read_line(&mut line).unwrap();
    if line.is_empty() {
        let mut stderr = String::new();
        let mut pipe = process.stderr.take().unwrap();
        pipe.read_to_string(&mut stderr).unwrap();
        assert!(stderr.contains("127.0.0.1:3000"), "{stderr}");
        assert_eq!(process.wait().unwrap().code(), Some(1));
    } else {
        assert_eq!(line, "ssecommander listening on http://127.0.0.1:3000\n");
        signal_process(process.id(), "TERM");
        assert!(process.wait().unwrap().success());
    }
}

#[test]
fn values_at_their_limits() {
    for options in [
        &["--timeout", "31536000", "--grace", "31536000"][..],
        &["--heartbeat=31536000", "--stall=31536000"],
        &["--timeout=0", "--grace=0", "--max-commands=1"],
        &["--timeout", "0.0", "--grace", "0.0"],
        &["--heartbeat", "0.001", "--stall", "0.5"],
        &["--timeout", "8.25", "--grace", "0.125", "-v"],
        &["--max-commands", "100000"],
        &["--allow", "true", "--allow=false"],
        &["--allow-origin", "*", "--no-token"],
        &["--allow-origin=https://a.example", "--allow-origin=http://b.example:8080"],
    ] {
        let server = Server::start(options);
        let fields = "Origin: http://".to_string() + &server.address + "\r\n";
        let events = server.get("/run?command=true", &fields).events();
        assert_eq!(outcome(&events), "exited:0", "{options:?}");
    }
}

/// Only a blank and a bare star at the end of the text is the wildcard.
#[test]
fn what_is_a_wildcard() {
    for (allowed, table) in [
        (
            "echo a *",
            &[
                ("echo a", 200),
                ("echo a b 'c d'", 200),
                ("echo 'a b'", 403),
                ("echo", 403),
                ("echo ab", 403),
            ][..],
        ),
        ("echo 'a' *", &[("echo a b", 200), ("echo b", 403)]),
        ("echo '*'", &[("echo '*'", 200), ("echo a", 403)]),
        ("echo \"*\"", &[("echo '*'", 200), ("echo a", 403)]),
        ("echo \\*", &[("echo '*'", 200), ("echo a", 403)]),
        ("echo \\ *", &[("echo ' *'", 200), ("echo a", 403)]),
        ("echo a*", &[("echo 'a*'", 200), ("echo ab", 403)]),
        ("echo ' *'", &[("echo ' *'", 200), ("echo a", 403)]),
        ("echo * a", &[("echo '*' a", 200), ("echo b a", 403)]),
        ("echo **", &[("echo '**'", 200), ("echo a", 403)]),
        ("*", &[("echo a", 403), ("true", 403), ("'*'", 200)]),
    ] {
        let server = Server::start(&["--allow", allowed]);
        for (command, status) in table {
            let response = server.get(&run_target(command), "");
            assert_eq!(response.status, *status, "{allowed}: {command}");
        }
    }
}

/// Whoever can be handed a variable is handed to every command as well: none is the token.
#[test]
fn no_variable_is_a_token() {
    let mut command = binary();
    command.args(["--listen", "127.0.0.1:0"]).env("SSECOMMANDER_TOKEN", "secret");
    let server = Server::start_command(command);
    let events = server.run("sh -c 'echo $SSECOMMANDER_TOKEN'");
    assert_eq!(output(&events, "stdout"), "secret\n");
    // Nor does it admit an address that needs one.
    let mut command = binary();
    command.args(["--listen", "0.0.0.0:0"]).env("SSECOMMANDER_TOKEN", "secret");
    is_refused(&mut command, 1, &["--token-file"]);
}

/// What is not the one line of readiness is a line of the log.
#[test]
fn one_line_on_stdout_and_the_log_on_stderr() {
    let mut command = binary();
    command
        .args(["--listen=127.0.0.1:0", "--verbose"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut process = command.spawn().unwrap();
    let mut stdout = BufReader::new(process.stdout.take().unwrap());
    let mut line = String::new();
    stdout.read_line(&mut line).unwrap();
    let address = address_of(&line).unwrap();
    let mut server = Server::found(process, address, 0);
    assert_eq!(outcome(&server.run("echo out")), "exited:0");
    assert_eq!(outcome(&server.run("nonesuch")), "failed:127");
    assert_eq!(server.get("/none", "").status, 404);
    let mut stderr = server.process.stderr.take().unwrap();
    server.signal("TERM");
    let (mut rest, mut log) = (String::new(), String::new());
    stdout.read_to_string(&mut rest).unwrap();
    stderr.read_to_string(&mut log).unwrap();
    assert_eq!(rest, "");
    assert!(server.exit_status().success());
    let happenings: Vec<_> = log.lines().map(|line| line.split(' ').nth(1).unwrap()).collect();
    for happening in ["listen", "run", "exit", "refuse", "stdout", "shutdown"] {
        assert!(happenings.contains(&happening), "{happening}: {log}");
    }
    assert_eq!(happenings[0], "listen");
}

/// Starts the program where its readiness cannot be read, and expects it to serve and to end all the same.
fn serves_unheard(mut command: Command, address: &str) {
    command.args(["--listen", address]);
    let process = command.spawn().unwrap();
    wait_for("the port to be open", || std::net::TcpStream::connect(address).is_ok());
    let mut server = Server::found(process, address.to_string(), 0);
    let usual = descriptors_of_a_command();
    for _ in 0..3 {
        assert_eq!(server.get("/none", "").status, 404);
        let events = server.run("sh -c 'echo y >&2; exec ls /proc/self/fd'");
        assert_eq!(output(&events, "stdout"), usual);
        assert_eq!(output(&events, "stderr"), "y\n");
        assert_eq!(outcome(&events), "exited:0");
    }
    let (mut client, _) = server.begin("sleep 1000");
    server.signal("TERM");
    assert_eq!(outcome(&client.rest()), "shutdown:15");
    assert_eq!(server.exit_status().code(), Some(0));
}

#[test]
fn streams_that_are_closed_or_full_do_not_stop_it() {
    for redirections in ["<&- >&- 2>&-", ">&-", "2>&-", ">/dev/full 2>/dev/full", ">&- 2>/dev/full"]
    {
        let command = binary_by_shell(&format!("exec \"$@\" {redirections}"));
        serves_unheard(command, &free_address());
    }
}

#[test]
fn pipes_that_nobody_reads_do_not_stop_it() {
    let mut stdout = Fifo::new();
    stdout.fill();
    let mut stderr = Fifo::new();
    stderr.fill();
    for waits in [true, false] {
        // Full, both or one; and without anybody who could read.
        for (out, err) in [(true, true), (true, false), (false, true)] {
            let mut command = binary();
            command.stdin(Stdio::null());
            if out {
                command.stdout(stdout.writer(waits));
            } else {
                command.stdout(Stdio::null());
            }
            if err {
                command.stderr(stderr.writer(waits));
            } else {
                command.stderr(Stdio::null());
            }
            serves_unheard(command, &free_address());
        }
    }
    for setup in ["exec \"$@\" 2>/dev/null | :", "exec \"$@\" 2>&1 >/dev/null | :"] {
        // The shell stays, for the pipe; the program below it is the supervisor.
        let mut command = binary_by_shell(setup);
        let address = free_address();
        command.args(["--listen", &address]);
        let process = command.spawn().unwrap();
        wait_for("the port to be open", || std::net::TcpStream::connect(&address).is_ok());
        let mut server = Server::found(process, address, 1);
        assert_eq!(server.get("/none", "").status, 404);
        assert_eq!(outcome(&server.run("echo x")), "exited:0");
        server.signal("TERM");
        server.exit_status();
        server.is_gone();
    }
}
