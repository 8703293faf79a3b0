//! A server under test, and a client that says exactly what it is told to.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpStream};
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

pub struct Server {
    /// What was started: the supervisor.
    pub process: Child,
    /// The server, its child.
    pub pid: u32,
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

    pub fn start_command(mut command: Command) -> Server {
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut process = command.spawn().unwrap();
        let mut line = String::new();
        BufReader::new(process.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let log = Arc::new(Mutex::new(String::new()));
        let (stderr, sink) = (process.stderr.take().unwrap(), log.clone());
        std::thread::spawn(move || {
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                sink.lock().unwrap().push_str(&(line + "\n"));
            }
        });
        let address = line.trim_end().strip_prefix("ssecommander listening on ");
        let address = address.unwrap_or_else(|| panic!("{line:?}, {}", log.lock().unwrap()));
        let address = address.trim_start_matches("http://");
        let pid = children_of(process.id())[0];
        Server { process, pid, address: address.to_string(), log }
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

    pub fn signal(&self, signal: &str) {
        signal_process(self.process.id(), signal);
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
        // What accepts, and what writes the log.
        wait_for("the connection's thread to end", || self.threads() == 2);
        (self.threads(), self.descriptors())
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
            let _ = Command::new("kill")
                .arg(self.process.id().to_string())
                .stderr(Stdio::null())
                .status();
            let deadline = Instant::now() + Duration::from_millis(patience);
            while Instant::now() < deadline && matches!(self.process.try_wait(), Ok(None)) {
                std::thread::sleep(Duration::from_millis(2));
            }
        }
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
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

/// `word:number` of the exit event: `exited:0`, `killed:9`.
pub fn outcome(events: &[Event]) -> String {
    let exits: Vec<_> = events.iter().filter(|event| event.event == "exit").collect();
    assert_eq!(exits.len(), 1, "{events:?}");
    assert_eq!(events.last(), Some(exits[0]));
    let (code, signal) = (exits[0].number("code"), exits[0].number("signal"));
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

/// The fields of /proc/PID/stat after the name, which is free text: 0 is the state, 1 the parent, 2 the group.
pub fn stat_field(pid: u32, field: usize) -> Option<String> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(") ")?.1.split(' ').nth(field).map(str::to_string)
}

/// The processes whose parent is `parent`.
pub fn children_of(parent: u32) -> Vec<u32> {
    let parent = parent.to_string();
    let processes = std::fs::read_dir("/proc")
        .unwrap()
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok()?.parse().ok());
    processes.filter(|&pid| stat_field(pid, 1).as_deref() == Some(&parent)).collect()
}

/// Whether a process is there and is no zombie.
pub fn is_alive(pid: u32) -> bool {
    stat_field(pid, 0).is_some_and(|state| state != "Z" && state != "X")
}

pub fn is_gone(pid: u32) {
    wait_for(&format!("process {pid} to end"), || !is_alive(pid));
}

pub fn signal_process(pid: u32, signal: &str) {
    let status = Command::new("kill").args(["-s", signal, &pid.to_string()]).status().unwrap();
    assert!(status.success());
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
