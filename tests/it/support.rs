//! A server under test, and a client that says exactly what it is told to.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

const BUILT: &str = env!("CARGO_BIN_EXE_ssecommander");
/// Longer than anything here takes on a machine that is busy with other things.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// The program under test: the one that cargo built, or what the variable names, such as `qemu-arm-static PATH`.
pub fn program() -> Vec<String> {
    let named = std::env::var("SSECOMMANDER_UNDER_TEST").unwrap_or(BUILT.to_string());
    named.split(' ').map(str::to_string).collect()
}

/// The program under test, still without options.
pub fn binary() -> Command {
    let words = program();
    let mut command = Command::new(&words[0]);
    command.args(&words[1..]);
    command
}

/// The program under test, started by a shell that has done `setup` first: closed a stream, set a limit.
/// The setup may hold redirections for the program behind a last `exec "$@"`.
pub fn binary_by_shell(setup: &str) -> Command {
    let script = if setup.contains("exec \"$@\"") {
        setup.to_string()
    } else {
        format!("{setup}; exec \"$@\"")
    };
    let mut command = Command::new("sh");
    command.args(["-c", &script, "sh"]).args(program());
    command
}

/// The program under test, as a file in `folder` that every user may execute.
pub fn binary_for_all(folder: &Folder) -> Vec<String> {
    let mut words = program();
    let path = folder.path("ssecommander");
    std::fs::copy(&words[words.len() - 1], &path).unwrap();
    for path in [folder.path(""), path.clone()] {
        succeeds(Command::new("chmod").args(["755", &path]));
    }
    words.pop();
    words.push(path);
    words
}

/// An address that was free a moment ago, on a number of 127.0.0.0/8 where no other test looks for a port.
pub fn free_address() -> String {
    let listener = TcpListener::bind("127.77.0.1:0").unwrap();
    listener.local_addr().unwrap().to_string()
}

/// What `ls /proc/self/fd` prints where nobody has opened anything: the standard streams, the folder that it reads, and
/// what whoever runs the tests has handed down.
pub fn descriptors_of_a_command() -> String {
    let output = Command::new("ls").arg("/proc/self/fd").stdin(Stdio::null()).output();
    String::from_utf8(output.unwrap().stdout).unwrap()
}

pub fn succeeds(command: &mut Command) {
    assert!(command.status().unwrap().success(), "{command:?}");
}

pub struct Server {
    /// What the test started: the supervisor, or what has started that.
    pub process: Child,
    pub supervisor: u32,
    /// The server, the supervisor's child.
    pub pid: u32,
    /// When the server was started, by which its number is told from a later one.
    started: Option<String>,
    /// `127.0.0.1:PORT`
    pub address: String,
    log: Arc<Mutex<String>>,
}

impl Server {
    pub fn start(options: &[&str]) -> Server {
        let mut command = binary();
        command.args(["--listen", "127.0.0.1:0"]).args(options);
        Server::start_command(command)
    }

    /// Of a command that becomes the supervisor.
    pub fn start_command(command: Command) -> Server {
        Server::start_below(command, 0)
    }

    /// Of a command whose descendant is the supervisor, so many generations below.
    pub fn start_below(mut command: Command, generations: usize) -> Server {
        command.stderr(Stdio::piped());
        let (mut process, address) = start_and_read_address(&mut command);
        let log = Arc::new(Mutex::new(String::new()));
        let (stderr, sink) = (process.stderr.take().unwrap(), log.clone());
        std::thread::spawn(move || {
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                sink.lock().unwrap().push_str(&(line + "\n"));
            }
        });
        let address = address.unwrap_or_else(|line| panic!("{line:?}, {}", log.lock().unwrap()));
        let mut server = Server::found(process, address, generations);
        server.log = log;
        server
    }

    /// Of a command whose log goes to `stderr`, which the test reads by itself or not at all.
    pub fn start_with_stderr(mut command: Command, stderr: impl Into<Stdio>) -> Server {
        command.stderr(stderr);
        let (process, address) = start_and_read_address(&mut command);
        Server::found(process, address.unwrap(), 0)
    }

    /// One that was started by `process`, and is known to be ready.
    pub fn found(process: Child, address: String, generations: usize) -> Server {
        let mut supervisor = process.id();
        for _ in 0..generations {
            supervisor = only_child_of(supervisor);
        }
        let pid = only_child_of(supervisor);
        Server {
            process,
            supervisor,
            pid,
            started: stat_field(pid, START_TIME),
            address,
            log: Arc::new(Mutex::new(String::new())),
        }
    }

    pub fn log(&self) -> String {
        self.log.lock().unwrap().clone()
    }

    /// Waits for a log line that has all of `parts`.
    pub fn logged(&self, parts: &[&str]) -> String {
        let mut found = String::new();
        wait_for(&format!("a log line with {parts:?}"), || {
            let log = self.log();
            let line = log.lines().find(|line| parts.iter().all(|part| line.contains(part)));
            found = line.unwrap_or_default().to_string();
            !found.is_empty()
        });
        found
    }

    pub fn connect(&self) -> Client {
        let stream = TcpStream::connect(&self.address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        stream.set_nodelay(true).unwrap();
        Client { stream: BufReader::new(stream) }
    }

    /// A GET on a connection of its own.
    pub fn get(&self, target: &str, fields: &str) -> Response {
        self.send(format!("GET {target} HTTP/1.1\r\nHost: {}\r\n{fields}\r\n", self.address))
    }

    /// Whatever `request` is, on a connection of its own.
    pub fn send(&self, request: impl AsRef<[u8]>) -> Response {
        let mut client = self.connect();
        client.write(request.as_ref());
        client.response()
    }

    /// Runs a command to its end.
    pub fn run(&self, command: &str) -> Vec<Event> {
        self.get(&run_target(command), "").events()
    }

    /// Starts a command, and waits for its `start`.
    pub fn begin(&self, command: &str) -> (Client, u32) {
        self.begin_by("GET", command, "\r\n")
    }

    /// The same for one that is fed; `rest` is what follows the `Host` field.
    pub fn begin_post(&self, command: &str, rest: &str) -> (Client, u32) {
        self.begin_by("POST", command, rest)
    }

    fn begin_by(&self, method: &str, command: &str, rest: &str) -> (Client, u32) {
        let (mut client, target) = (self.connect(), run_target(command));
        let host = &self.address;
        client.write(format!("{method} {target} HTTP/1.1\r\nHost: {host}\r\n{rest}"));
        let pid = client.started();
        (client, pid)
    }

    /// A signal to the supervisor.
    pub fn signal(&self, signal: &str) {
        signal_process(self.supervisor, signal);
    }

    /// Whether the server, not only the supervisor, is there.
    pub fn is_alive(&self) -> bool {
        is_alive(self.pid) && stat_field(self.pid, START_TIME) == self.started
    }

    /// The server ends by itself when its supervisor is killed.
    pub fn is_gone(&self) {
        wait_for("the server to end", || !self.is_alive());
    }

    /// What commands have started without a session of its own: the living, but for the server.
    pub fn session(&self) -> Vec<u32> {
        let mut processes = processes_with(SESSION, self.pid);
        processes.retain(|&pid| pid != self.pid && is_alive(pid));
        processes
    }

    /// Waits until so many processes of the session, whatever their groups, live.
    pub fn session_has(&self, count: usize) {
        wait_for(&format!("{count} processes of commands"), || self.session().len() == count);
    }

    pub fn exit_status(&mut self) -> std::process::ExitStatus {
        let mut status = None;
        wait_for("the server to exit", || {
            status = self.process.try_wait().unwrap();
            status.is_some()
        });
        status.unwrap()
    }

    /// How many threads and descriptors the server has while it does nothing.
    pub fn at_rest(&self) -> (usize, usize) {
        assert_eq!(self.get("/none", "Connection: close\r\n").status, 404);
        let (mut counts, mut since) = ((0, 0), Instant::now());
        wait_for("the connections' threads to end", || {
            let counted = (self.threads(), self.descriptors());
            if counted != std::mem::replace(&mut counts, counted) {
                since = Instant::now();
            }
            since.elapsed() > Duration::from_millis(400)
        });
        counts
    }

    pub fn threads(&self) -> usize {
        self.count("task")
    }

    fn descriptors(&self) -> usize {
        self.count("fd")
    }

    fn count(&self, folder: &str) -> usize {
        let folder = format!("/proc/{}/{folder}", self.pid);
        std::fs::read_dir(folder).unwrap().count()
    }

    /// Processor time of the server so far, in clock ticks.
    pub fn processor_time(&self) -> u64 {
        let ticks = |field| stat_field(self.pid, field).unwrap().parse::<u64>().unwrap();
        ticks(11) + ticks(12)
    }

    /// Resident memory in kB.
    pub fn memory(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid));
        let status = status.unwrap();
        let mut lines = status.lines();
        let line = lines.find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        line.trim().trim_end_matches(" kB").parse().unwrap()
    }

    /// The commands: the processes whose parent is the server.
    pub fn children(&self) -> Vec<u32> {
        children_of(self.pid)
    }

    /// Waits until the server is as it was after its start: no command, no thread, no descriptor more.
    pub fn comes_to_rest(&self, (threads, descriptors): (usize, usize)) {
        wait_for("threads, descriptors and children to go", || {
            self.threads() <= threads
                && self.descriptors() <= descriptors
                && self.children().is_empty()
        });
    }
}

impl Drop for Server {
    /// Ends the server in its own way; a second signal, which counts as one only after a while, makes it quick.
    fn drop(&mut self) {
        for patience in [300, 3000] {
            if matches!(self.process.try_wait(), Ok(None)) {
                let _ = Command::new("kill")
                    .arg(self.supervisor.to_string())
                    .stderr(Stdio::null())
                    .status();
            }
            let deadline = Instant::now() + Duration::from_millis(patience);
            while Instant::now() < deadline && matches!(self.process.try_wait(), Ok(None)) {
                std::thread::sleep(Duration::from_millis(2));
            }
        }
        let _ = self.process.kill();
        let _ = self.process.wait();
        // Only a program with a fault comes to this.
        if self.is_alive() {
            let _ = Command::new("kill").args(["-9", &self.pid.to_string()]).status();
        }
    }
}

/// What `command` prints when it is ready, as an address; else what it printed.
fn start_and_read_address(command: &mut Command) -> (Child, Result<String, String>) {
    command.stdin(Stdio::null()).stdout(Stdio::piped());
    let mut process = command.spawn().unwrap();
    let stdout = BufReader::new(process.stdout.take().unwrap());
    let (sender, receiver) = std::sync::mpsc::channel();
    std::thread::spawn(move || sender.send(stdout.lines().next()));
    let Ok(line) = receiver.recv_timeout(PATIENCE) else {
        process.kill().unwrap();
        process.wait().unwrap();
        panic!("not a word from {command:?}");
    };
    let line = line.unwrap_or(Ok(String::new())).unwrap();
    (process, address_of(&line).ok_or(line))
}

/// What a program printed that ends by itself, and its exit status.
pub fn output_of(command: &mut Command) -> (i32, String, String) {
    command.stdin(Stdio::null());
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let process = command.spawn().unwrap();
    let pid = process.id();
    let (sender, receiver) = std::sync::mpsc::channel();
    std::thread::spawn(move || sender.send(process.wait_with_output()));
    let Ok(output) = receiver.recv_timeout(PATIENCE) else {
        signal_process(pid, "TERM");
        panic!("it does not end: {command:?}");
    };
    let output = output.unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
}

/// `127.0.0.1:PORT` of the line that tells that a server is ready.
pub fn address_of(line: &str) -> Option<String> {
    let address = line.strip_prefix("ssecommander listening on http://")?;
    Some(address.trim_end().to_string())
}

pub struct Client {
    pub stream: BufReader<TcpStream>,
}

#[derive(Debug)]
pub struct Response {
    pub status: u16,
    /// Names in lower case.
    pub fields: Vec<(String, String)>,
    pub content: Vec<u8>,
    pub trailers: Vec<(String, String)>,
    /// The content came to its proper end.
    pub complete: bool,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    pub id: String,
    pub event: String,
    pub data: String,
}

impl Client {
    pub fn of(stream: TcpStream) -> Client {
        Client { stream: BufReader::new(stream) }
    }

    pub fn write(&mut self, bytes: impl AsRef<[u8]>) {
        // A server that has said its refusal may close at any time.
        let _ = self.stream.get_mut().write_all(bytes.as_ref());
    }

    pub fn half_close(&self) {
        self.stream.get_ref().shutdown(Shutdown::Write).unwrap();
    }

    fn line(&mut self) -> String {
        let mut line = Vec::new();
        self.stream.read_until(b'\n', &mut line).unwrap();
        String::from_utf8(line).unwrap()
    }

    fn fields(&mut self) -> Vec<(String, String)> {
        let mut fields = Vec::new();
        loop {
            let line = self.line();
            assert!(line.ends_with("\r\n"), "a field line that breaks off: {line:?}");
            let Some((name, value)) = line.trim_end().split_once(": ") else {
                assert_eq!(line, "\r\n");
                return fields;
            };
            fields.push((name.to_ascii_lowercase(), value.to_string()));
        }
    }

    /// The status and the fields of the next response.
    pub fn head(&mut self) -> Response {
        let line = self.line();
        let status = line
            .strip_prefix("HTTP/1.1 ")
            .and_then(|rest| rest.get(..3))
            .and_then(|code| code.parse().ok());
        let status = status.unwrap_or_else(|| panic!("no status line: {line:?}"));
        Response {
            status,
            fields: self.fields(),
            content: Vec::new(),
            trailers: Vec::new(),
            complete: false,
        }
    }

    /// The next response to anything but HEAD.
    pub fn response(&mut self) -> Response {
        let mut response = self.head();
        self.read_content(&mut response);
        response
    }

    pub fn read_content(&mut self, response: &mut Response) {
        if response.status < 200 || response.status == 204 {
            response.complete = true;
        } else if response.field("transfer-encoding").is_some() {
            let start = Instant::now();
            while let Some(chunk) = self.chunk() {
                assert!(start.elapsed() < PATIENCE, "a response without an end");
                if chunk.is_empty() {
                    response.trailers = self.fields();
                    response.complete = true;
                    break;
                }
                response.content.extend(chunk);
            }
        } else if let Some(length) = response.field("content-length") {
            response.content = vec![0; length.parse().unwrap()];
            self.stream.read_exact(&mut response.content).unwrap();
            response.complete = true;
        } else {
            response.complete = self.stream.read_to_end(&mut response.content).is_ok();
        }
    }

    /// The next chunk; the last one is empty, none is a connection that was cut off.
    pub fn chunk(&mut self) -> Option<Vec<u8>> {
        let mut line = Vec::new();
        self.stream.read_until(b'\n', &mut line).ok()?;
        let line = String::from_utf8(line).unwrap();
        let size = usize::from_str_radix(line.strip_suffix("\r\n")?, 16).unwrap();
        if size == 0 {
            return Some(Vec::new());
        }
        let mut chunk = vec![0; size + 2];
        self.stream.read_exact(&mut chunk).ok()?;
        assert!(chunk.ends_with(b"\r\n"));
        chunk.truncate(size);
        Some(chunk)
    }

    /// Reads the head and the first chunk of an event stream, which hold `start`.
    pub fn started(&mut self) -> u32 {
        let head = self.head();
        assert_eq!(head.status, 200, "{head:?}");
        let events = parse_events(&self.chunk().unwrap());
        assert_eq!(events[0].event, "start");
        events[0].number("pid") as u32
    }

    /// Reads chunks until what they hold has `text` in it.
    pub fn read_until(&mut self, text: &str) -> String {
        let (mut content, start) = (String::new(), Instant::now());
        while !content.contains(text) {
            assert!(start.elapsed() < PATIENCE, "no {text:?} in {content:?}");
            let chunk = self.chunk().unwrap_or_else(|| panic!("cut off after {content:?}"));
            assert!(!chunk.is_empty(), "ended after {content:?}");
            content.push_str(&String::from_utf8(chunk).unwrap());
        }
        content
    }

    /// Reads to the last chunk of an event stream whose head was read.
    pub fn rest(&mut self) -> Vec<Event> {
        let (mut content, start) = (Vec::new(), Instant::now());
        loop {
            // Comments may come for ever.
            assert!(start.elapsed() < PATIENCE, "a stream without an end");
            let chunk = self.chunk().expect("a stream that is not cut off");
            if chunk.is_empty() {
                assert!(self.fields().is_empty());
                return parse_events(&content);
            }
            content.extend(chunk);
        }
    }

    /// Whether the server has closed the connection, and said nothing more.
    pub fn is_closed(&mut self) -> bool {
        let mut rest = Vec::new();
        self.stream.read_to_end(&mut rest).is_ok() && rest.is_empty()
    }
}

impl Response {
    pub fn field(&self, name: &str) -> Option<&str> {
        let mut values =
            self.fields.iter().filter(|field| field.0 == name).map(|field| field.1.as_str());
        let value = values.next();
        assert!(values.next().is_none(), "{name} twice");
        value
    }

    pub fn text(&self) -> &str {
        std::str::from_utf8(&self.content).unwrap()
    }

    pub fn events(&self) -> Vec<Event> {
        assert_eq!(self.status, 200, "{self:?}");
        assert!(self.complete, "{self:?}");
        parse_events(&self.content)
    }
}

impl Event {
    /// A number of the data; -1 for `null`.
    pub fn number(&self, name: &str) -> i64 {
        let (_, rest) = self
            .data
            .split_once(&format!("\"{name}\":"))
            .unwrap_or_else(|| panic!("no {name} in {self:?}"));
        let end = rest.find([',', '}']).unwrap();
        rest[..end]
            .parse()
            .unwrap_or_else(|_| if &rest[..end] == "null" { -1 } else { panic!("{rest}") })
    }

    /// The text of the data, where it has no escapes but line ends.
    pub fn out(&self) -> String {
        let (_, rest) = self.data.split_once("\"out\":\"").unwrap();
        let text = if self.event == "exit" {
            &rest[..rest.find('"').unwrap()]
        } else {
            rest.strip_suffix("\"}").unwrap()
        };
        text.replace("\\n", "\n").replace("\\t", "\t")
    }
}

/// The events of a stream. Comments are skipped; everything else has to be in the form that the contract shows.
pub fn parse_events(stream: &[u8]) -> Vec<Event> {
    let text = std::str::from_utf8(stream).unwrap();
    let text: String = text.split_inclusive('\n').filter(|line| *line != ":\n").collect();
    let blocks = text.split_terminator("\n\n").map(|block| {
        let lines: Vec<&str> = block.split('\n').collect();
        let [id, event, data] = lines[..] else { panic!("{block:?}") };
        let value = |line: &str, name| {
            line.strip_prefix(name).unwrap_or_else(|| panic!("{block:?}")).to_string()
        };
        Event { id: value(id, "id: "), event: value(event, "event: "), data: value(data, "data: ") }
    });
    blocks.collect()
}

/// All that came from one source.
pub fn output(events: &[Event], source: &str) -> String {
    events.iter().filter(|event| event.event == source).map(Event::out).collect()
}

/// `word:number` of the exit event: `exited:0`, `killed:9`; `left:` has neither number.
pub fn outcome(events: &[Event]) -> String {
    let exits: Vec<_> = events.iter().filter(|event| event.event == "exit").collect();
    assert_eq!(exits.len(), 1, "{events:?}");
    assert_eq!(events.last(), Some(exits[0]));
    let (code, signal) = (exits[0].number("code"), exits[0].number("signal"));
    if exits[0].out() == "left" {
        assert_eq!((code, signal), (-1, -1), "{events:?}");
        return "left:".to_string();
    }
    assert!((code == -1) != (signal == -1), "{events:?}");
    format!("{}:{}", exits[0].out(), code.max(signal))
}

pub fn run_target(command: &str) -> String {
    format!("/run?command={}", percent_encode(command.as_bytes()))
}

pub fn percent_encode(bytes: &[u8]) -> String {
    let encode = |&byte: &u8| match byte {
        b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'/' => {
            (byte as char).to_string()
        }
        _ => format!("%{byte:02X}"),
    };
    bytes.iter().map(encode).collect()
}

pub fn wait_for(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Tries all cases at the same time, each on servers of its own: most of what they do is to wait.
pub fn at_once<Case: Send>(cases: impl IntoIterator<Item = Case>, test: impl Fn(Case) + Sync) {
    std::thread::scope(|scope| {
        for case in cases {
            let test = &test;
            scope.spawn(move || test(case));
        }
    });
}

/// Places in what follows the name in /proc/PID/stat.
pub const STATE: usize = 0;
pub const PARENT: usize = 1;
pub const GROUP: usize = 2;
pub const SESSION: usize = 3;
pub const TERMINAL: usize = 4;
pub const START_TIME: usize = 19;

/// A field of /proc/PID/stat after the name, which is free text.
pub fn stat_field(pid: u32, field: usize) -> Option<String> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(") ")?.1.split(' ').nth(field).map(str::to_string)
}

fn processes() -> Vec<u32> {
    let entries = std::fs::read_dir("/proc").unwrap();
    entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()?.parse().ok()).collect()
}

/// The processes that have `number` in a field of their stat.
fn processes_with(field: usize, number: u32) -> Vec<u32> {
    let (mut processes, number) = (processes(), number.to_string());
    processes.retain(|&pid| stat_field(pid, field).as_deref() == Some(&number));
    processes
}

/// The processes that have `text` in their command line.
pub fn processes_told(text: &str) -> Vec<u32> {
    let mut processes = processes();
    processes.retain(|pid| {
        let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        String::from_utf8_lossy(&line).contains(text)
    });
    processes
}

/// The processes whose parent is `parent`, zombies too.
pub fn children_of(parent: u32) -> Vec<u32> {
    processes_with(PARENT, parent)
}

fn only_child_of(parent: u32) -> u32 {
    let mut children = Vec::new();
    // Another may be about to end, as the rest of a shell's pipeline, or this one to begin.
    wait_for(&format!("{parent} to have one child"), || {
        children = children_of(parent);
        children.retain(|&pid| is_alive(pid));
        children.len() == 1
    });
    children[0]
}

/// Whether a process is there and is no zombie.
pub fn is_alive(pid: u32) -> bool {
    stat_field(pid, STATE).is_some_and(|state| state != "Z" && state != "X")
}

pub fn is_gone(pid: u32) {
    wait_for(&format!("process {pid} to end"), || !is_alive(pid));
}

pub fn signal_process(pid: u32, signal: &str) {
    succeeds(Command::new("kill").args(["-s", signal, &pid.to_string()]));
}

/// A folder of the test's own, removed in the end.
pub struct Folder(pub std::path::PathBuf);

impl Folder {
    pub fn new() -> Folder {
        static COUNT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let number = COUNT.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
        let path =
            std::env::temp_dir().join(format!("ssecommander-test-{}-{number}", std::process::id()));
        std::fs::create_dir(&path).unwrap();
        Folder(path)
    }

    pub fn path(&self, name: &str) -> String {
        self.0.join(name).to_str().unwrap().to_string()
    }

    /// Writes a file that a test's command can be told to wait for, or a script.
    pub fn write(&self, name: &str, content: impl AsRef<[u8]>) -> String {
        std::fs::write(self.0.join(name), content).unwrap();
        self.path(name)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// The folder where .ci/run has installed the libraries.
pub fn libraries() -> String {
    std::env::var("TEST_LIBRARIES")
        .expect("TEST_LIBRARIES names a folder with a Python environment and node_modules")
}

/// Numbers that are the same in every run (Marsaglia's xorshift).
pub struct Numbers(pub u64);

impl Numbers {
    pub fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}

/// A pipe with a name: it can be filled, left full and emptied while it is somebody's stdout or stderr.
pub struct Fifo {
    path: String,
    /// Open for both, so that nobody waits for the other side; it never waits either.
    end: File,
    read: Vec<u8>,
    _folder: Folder,
}

const O_NONBLOCK: i32 = 0o4000;

impl Fifo {
    pub fn new() -> Fifo {
        let folder = Folder::new();
        let path = folder.path("pipe");
        succeeds(Command::new("mkfifo").arg(&path));
        let mut options = OpenOptions::new();
        options.read(true).write(true).custom_flags(O_NONBLOCK);
        Fifo { end: options.open(&path).unwrap(), path, read: Vec::new(), _folder: folder }
    }

    /// What is given to a program; where it waits, writes to it wait while the pipe is full.
    pub fn writer(&self, waits: bool) -> File {
        let mut options = OpenOptions::new();
        options.write(true);
        if !waits {
            options.custom_flags(O_NONBLOCK);
        }
        options.open(&self.path).unwrap()
    }

    /// Fills it to the last byte, by empty lines.
    pub fn fill(&mut self) {
        for length in [4096, 1] {
            while self.end.write(&[b'\n'; 4096][..length]).is_ok() {}
        }
    }

    /// All lines that ever came, but for those that filled it.
    pub fn lines(&mut self) -> Vec<String> {
        let mut piece = [0; 65536];
        while let Ok(length) = self.end.read(&mut piece) {
            self.read.extend(&piece[..length]);
        }
        let text = String::from_utf8(self.read.clone()).unwrap();
        let lines = text.split_inclusive('\n');
        lines
            .filter_map(|line| line.strip_suffix('\n'))
            .filter(|line| !line.is_empty())
            .map(str::to_string)
            .collect()
    }
}

/// A shell script that starts another one in a process group that it names, as no usual program does:
/// `sh FILE GROUP SCRIPT`, where GROUP is a number, or 0 for a group of its own. It is this program that does it, see below.
pub fn in_group(folder: &Folder) -> String {
    let this = std::env::current_exe().unwrap();
    let script = format!(
        "HELPER_GROUP=$1 HELPER_SCRIPT=$2 exec '{}' --ignored --exact support::helper --nocapture 3>&1 >/dev/null",
        this.to_str().unwrap()
    );
    folder.write("in-group", script)
}

/// A process of its own that holds so many silent connections, since one's descriptors may not suffice; they end with it.
pub struct SilentConnections(Child);

impl SilentConnections {
    pub fn open(address: &str, count: usize) -> SilentConnections {
        let mut command = Command::new("sh");
        let script =
            "ulimit -n $(ulimit -H -n); exec \"$0\" --ignored --exact support::helper --nocapture";
        command.args(["-c", script]).arg(std::env::current_exe().unwrap());
        command.env("HELPER_ADDRESS", address).env("HELPER_COUNT", count.to_string());
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut process = command.spawn().unwrap();
        let output = BufReader::new(process.stdout.take().unwrap());
        let connections = SilentConnections(process);
        let mut lines = output.lines().map_while(Result::ok);
        assert!(lines.any(|line| line == "connected"));
        connections
    }
}

impl Drop for SilentConnections {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
#[ignore = "is a program that tests start"]
fn helper() {
    let variable = |name| std::env::var(name).ok();
    if let (Some(group), Some(script)) = (variable("HELPER_GROUP"), variable("HELPER_SCRIPT")) {
        let mut command = Command::new("sh");
        let script = format!("exec >&3 3>&-; unset HELPER_GROUP HELPER_SCRIPT; {script}");
        let error = command.args(["-c", &script]).process_group(group.parse().unwrap()).exec();
        panic!("{error}");
    }
    if let (Some(address), Some(count)) = (variable("HELPER_ADDRESS"), variable("HELPER_COUNT")) {
        let connect = |_| TcpStream::connect(&address).unwrap();
        let connections: Vec<_> = (0..count.parse().unwrap()).map(connect).collect();
        println!("\nconnected");
        // Until the test ends it, or has ended.
        let _ = std::io::stdin().read(&mut [0]);
        drop(connections);
    }
}
