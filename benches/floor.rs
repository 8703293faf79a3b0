//! What the server makes of a machine, beside what the machine can do: each figure with its ratio to a floor that was measured in the
//! same run. `cargo bench` takes about a minute. A result that is not complete ends it with a panic.

use std::fmt::Display;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const BINARY: &str = env!("CARGO_BIN_EXE_ssecommander");
const ROUNDS: usize = 5;
const STREAM: usize = 64 << 20;
const RUNS: usize = 400;
const SILENT: usize = 100;

struct Server {
    process: Child,
    address: String,
}

impl Server {
    fn start() -> Server {
        let mut command = Command::new(BINARY);
        command.args(["--listen", "127.0.0.1:0", "--max-commands", "200"]);
        let mut process = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(process.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let address = line.trim_end().rsplit('/').next().unwrap().to_string();
        Server { process, address }
    }

    fn request(&self, command: &str, version: &str) -> TcpStream {
        let mut stream = TcpStream::connect(&self.address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        let command = command.replace(' ', "+");
        let request =
            format!("GET /run?command={command} HTTP/{version}\r\nHost: {}\r\n\r\n", self.address);
        stream.write_all(request.as_bytes()).unwrap();
        stream
    }

    /// Runs a command to its end, and checks that all of its output came.
    fn run(&self, command: &str, bytes: usize) {
        let mut stream = self.request(command, "1.0");
        let (mut buffer, mut tail) = (vec![0; 256 << 10], Vec::new());
        loop {
            let length = stream.read(&mut buffer).unwrap();
            if length == 0 {
                break;
            }
            tail.extend_from_slice(&buffer[length.saturating_sub(400)..length]);
            tail.drain(..tail.len().saturating_sub(400));
        }
        let tail = String::from_utf8_lossy(&tail);
        let expected = [
            "\"out\":\"exited\",\"code\":0".to_string(),
            format!("\"stdout_bytes\":{bytes},\"stderr_bytes\":0"),
        ];
        assert!(expected.iter().all(|part| tail.contains(part)), "{command}: {tail}");
    }

    /// Proportional memory, in kB, of the supervisor and the server together.
    fn memory(&self) -> f64 {
        let supervisor = self.process.id();
        let children = std::fs::read_dir("/proc").unwrap().filter_map(|entry| {
            let pid: u32 = entry.ok()?.file_name().to_str()?.parse().ok()?;
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
            let parent = stat.rsplit_once(") ")?.1.split(' ').nth(1)?;
            (parent == supervisor.to_string()).then_some(pid)
        });
        children.chain([supervisor]).map(proportional_memory).sum()
    }
}

fn proportional_memory(pid: u32) -> f64 {
    let rollup = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap();
    let line = rollup.lines().find(|line| line.starts_with("Pss:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = Command::new("kill").arg(self.process.id().to_string()).status();
        let _ = self.process.wait();
    }
}

/// The same bytes from a pipe to a socket, unencoded.
fn copy_raw(command: &str) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (mut socket, _) = listener.accept().unwrap();
    let mut words = command.split(' ');
    let mut process =
        Command::new(words.next().unwrap()).args(words).stdout(Stdio::piped()).spawn().unwrap();
    let copier = std::thread::spawn(move || {
        let (mut pipe, mut buffer) = (process.stdout.take().unwrap(), vec![0; 64 << 10]);
        loop {
            match pipe.read(&mut buffer).unwrap() {
                0 => break,
                length => socket.write_all(&buffer[..length]).unwrap(),
            }
        }
        assert!(process.wait().unwrap().success());
    });
    let (mut buffer, mut total) = (vec![0; 256 << 10], 0);
    loop {
        match client.read(&mut buffer).unwrap() {
            0 => break,
            length => total += length,
        }
    }
    copier.join().unwrap();
    assert_eq!(total, STREAM);
}

fn spawn_raw() {
    let output = Command::new("true").stdin(Stdio::null()).output().unwrap();
    assert!(output.status.success() && output.stdout.is_empty());
}

/// `work` done `count` times by each of `threads`.
fn in_threads(threads: usize, count: usize, work: impl Fn() + Sync) {
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| (0..count).for_each(|_| work()));
        }
    });
}

/// Seconds that two pieces of work take: the medians of interleaved rounds.
fn compare(mut ours: impl FnMut(), mut floor: impl FnMut()) -> (f64, f64) {
    let mut times = [Vec::new(), Vec::new()];
    for _ in 0..ROUNDS {
        for (index, work) in [&mut ours as &mut dyn FnMut(), &mut floor].into_iter().enumerate() {
            let start = Instant::now();
            work();
            times[index].push(start.elapsed().as_secs_f64());
        }
    }
    let [ours, floor] = times.map(median);
    (ours, floor)
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn row(what: &str, ours: impl Display, floor: impl Display, ratio: impl Display) {
    println!("| {what:<34} | {ours:>10} | {floor:>10} | {ratio:>6} |");
}

/// 64 MiB of text in lines, of several languages, or of any bytes.
fn test_file(name: &str) -> std::path::PathBuf {
    let path =
        std::env::temp_dir().join(format!("ssecommander-bench-{}-{name}", std::process::id()));
    let line = match name {
        "lines" => "The quick brown fox jumps over the lazy dog, and says \"so what\" to it.\n"
            .as_bytes()
            .to_vec(),
        "languages" => "Größe, 大きさ, размер, μέγεθος, حجم, 😀 and size.\n".as_bytes().to_vec(),
        _ => {
            let mut state = 1_u32;
            let mut next = || {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (state >> 24) as u8
            };
            (0..1 << 20).map(|_| next()).collect()
        }
    };
    let content: Vec<u8> = line.iter().copied().cycle().take(STREAM).collect();
    std::fs::write(&path, content).unwrap();
    path
}

fn main() {
    let server = Server::start();
    row("measure", "server", "floor", "ratio");
    println!("|---|---|---|---|");
    for name in ["lines", "languages", "bytes"] {
        let file = test_file(name);
        let command = format!("cat {}", file.display());
        let (ours, floor) = compare(|| server.run(&command, STREAM), || copy_raw(&command));
        let rate = |seconds: f64| format!("{:.0}", STREAM as f64 / seconds / 1e6);
        row(
            &format!("output, {name}, MB/s"),
            rate(ours),
            rate(floor),
            format!("{:.2}", floor / ours),
        );
        std::fs::remove_file(file).unwrap();
    }
    for clients in [1, 8] {
        let count = RUNS / clients;
        let (ours, floor) = compare(
            || in_threads(clients, count, || server.run("true", 0)),
            || in_threads(clients, count, spawn_raw),
        );
        let rate = |seconds: f64| format!("{:.0}", RUNS as f64 / seconds);
        row(
            &format!("runs a second, {clients} at a time"),
            rate(ours),
            rate(floor),
            format!("{:.2}", floor / ours),
        );
    }
    let first = |stream: TcpStream| {
        let mut line = String::new();
        let mut lines = BufReader::new(stream);
        while !line.contains("event: start") {
            line.clear();
            assert!(lines.read_line(&mut line).unwrap() > 0);
        }
    };
    let (ours, floor) = compare(
        || (0..100).for_each(|_| first(server.request("true", "1.0"))),
        || (0..100).for_each(|_| spawn_raw()),
    );
    let millis = |seconds: f64| format!("{:.2}", seconds * 10.0);
    row("request to start event, ms", millis(ours), millis(floor), format!("{:.2}", ours / floor));
    drop(server);

    let server = Server::start();
    server.run("true", 0);
    let rest = server.memory();
    let streams: Vec<_> = (0..SILENT)
        .map(|_| {
            let mut stream = server.request("sleep 1000", "1.1");
            assert!(stream.read(&mut [0; 4096]).unwrap() > 0);
            stream
        })
        .collect();
    row("memory at rest, kB", format!("{rest:.0}"), "", "");
    row(
        "memory of a silent stream, kB",
        format!("{:.1}", (server.memory() - rest) / SILENT as f64),
        "",
        "",
    );
    drop(streams);
    drop(server);

    let (ours, floor) = compare(|| Server::start().run("true", 0), spawn_raw);
    row(
        "start to first result and end, ms",
        format!("{:.1}", ours * 1e3),
        format!("{:.1}", floor * 1e3),
        format!("{:.1}", ours / floor),
    );
    let size = std::fs::metadata(BINARY).unwrap().len();
    row("size of the binary, kB", size / 1000, "", "");
}
