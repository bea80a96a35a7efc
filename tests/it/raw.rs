use std::collections::HashMap;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::LazyLock;

fn sources() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/hostile")
}

/// A component from its text form.
pub fn assemble(text: &str) -> Vec<u8> {
    // A package of its own, built once: see its manifest.
    static ASSEMBLER: LazyLock<PathBuf> = LazyLock::new(|| {
        let target = Path::new(env!("CARGO_TARGET_TMPDIR")).join("assemble");
        let built = Command::new(env!("CARGO"))
            .args(["build", "--release", "--quiet", "--locked", "--manifest-path"])
            .arg(sources().join("assemble/Cargo.toml"))
            .arg("--target-dir")
            .arg(&target)
            .status();
        assert!(built.expect("failed to start cargo").success(), "the assembler does not build");
        target.join("release/assemble")
    });
    let mut assembler = Command::new(&*ASSEMBLER)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("failed to start the assembler");
    assembler.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
    let output = assembler.wait_with_output().unwrap();
    assert!(output.status.success(), "the component can not be assembled");
    output.stdout
}

/// The raw guest `name`, in a file in `directory`.
pub fn raw_guest(name: &str, directory: &Path) -> PathBuf {
    let read = |name: &str| std::fs::read_to_string(sources().join("raw").join(name)).unwrap();
    let mut guest = read(&format!("{name}.wat"));
    if guest.contains("\n(component") {
        return save(directory, name, &guest.replace(";; MEMORY", &read("memory.wat")));
    }
    if !guest.contains("(core module $memory") {
        guest = read("memory.wat") + &guest;
    }
    save(directory, name, &read("frame.wat").replace(";; GUEST", &guest))
}

/// The component with this text, in a file in `directory`.
pub fn save(directory: &Path, name: &str, text: &str) -> PathBuf {
    let path = directory.join(format!("{name}.wasm"));
    std::fs::write(&path, assemble(text)).unwrap();
    path
}

/// What the guest `puppet` shall do, call by call; see there.
#[derive(Clone, Default)]
pub struct Script(Vec<Order>);

#[derive(Clone)]
struct Order {
    operation: u32,
    first: Place,
    second: Place,
    value: u32,
    times: u32,
    numbers: (u64, u64),
}

/// What an order is about.
#[derive(Clone)]
enum Place {
    /// Bytes that come with the script.
    Bytes(Vec<u8>),
    /// An address and a length, whatever is there.
    Raw(u32, u32),
}

impl Script {
    pub fn new() -> Script {
        Script::default()
    }

    fn add(mut self, operation: u32, first: Place) -> Script {
        let second = Place::Bytes(Vec::new());
        self.0.push(Order { operation, first, second, value: 0, times: 1, numbers: (0, 0) });
        self
    }

    fn call(self, operation: u32, bytes: impl AsRef<[u8]>) -> Script {
        self.add(operation, Place::Bytes(bytes.as_ref().to_vec()))
    }

    /// The last order so often.
    pub fn times(mut self, times: u32) -> Script {
        self.0.last_mut().unwrap().times = times;
        self
    }

    /// The last order with these numbers, which are some operations' own.
    fn numbers(mut self, numbers: (u64, u64)) -> Script {
        self.0.last_mut().unwrap().numbers = numbers;
        self
    }

    /// Returns `response` from `handle`, which ends the request.
    pub fn answer(self, response: impl AsRef<[u8]>) -> Vec<u8> {
        self.call(0, response).bytes()
    }

    /// Returns the list of `length` bytes at `address`.
    pub fn answer_raw(self, address: u32, length: u32) -> Vec<u8> {
        self.add(0, Place::Raw(address, length)).bytes()
    }

    /// Returns `pointer`, which should point to a list.
    pub fn return_pointer(self, pointer: u32) -> Vec<u8> {
        self.add(20, Place::Raw(pointer, 0)).bytes()
    }

    pub fn start(self, head: impl AsRef<[u8]>) -> Script {
        self.call(1, head)
    }

    pub fn start_raw(self, address: u32, length: u32) -> Script {
        self.add(1, Place::Raw(address, length))
    }

    pub fn write(self, chunk: impl AsRef<[u8]>) -> Script {
        self.call(2, chunk)
    }

    pub fn write_raw(self, address: u32, length: u32) -> Script {
        self.add(2, Place::Raw(address, length))
    }

    pub fn finish(self) -> Script {
        self.call(3, "")
    }

    pub fn send_whole(self, response: impl AsRef<[u8]>) -> Script {
        self.call(21, response)
    }

    pub fn send_whole_raw(self, address: u32, length: u32) -> Script {
        self.add(21, Place::Raw(address, length))
    }

    pub fn early_hints(self, fields: impl AsRef<[u8]>) -> Script {
        self.call(4, fields)
    }

    pub fn send_file(self, head: &str, path: impl AsRef<[u8]>, offset: u64, length: u64) -> Script {
        let mut script = self.call(5, head).numbers((offset, length));
        script.0.last_mut().unwrap().second = Place::Bytes(path.as_ref().to_vec());
        script
    }

    pub fn read(self, max: u32) -> Script {
        self.add(6, Place::Raw(0, max))
    }

    pub fn random(self, length: u64) -> Script {
        self.call(7, "").numbers((length, 0))
    }

    /// A pollable that is ready after so many nanoseconds.
    pub fn timer(self, nanoseconds: u64) -> Script {
        self.call(8, "").numbers((nanoseconds, 0))
    }

    /// Waits for the last timer.
    pub fn wait(self) -> Script {
        self.call(9, "")
    }

    /// Polls a list that names the last timer so often, built at `address`.
    pub fn poll(self, address: u32, length: u32) -> Script {
        self.add(10, Place::Raw(address, length))
    }

    pub fn log(self, text: impl AsRef<[u8]>) -> Script {
        self.call(11, text)
    }

    pub fn log_raw(self, address: u32, length: u32) -> Script {
        self.add(11, Place::Raw(address, length))
    }

    pub fn log_zeroes(self, length: u64) -> Script {
        self.call(12, "").numbers((length, 0))
    }

    pub fn exit(self) -> Script {
        self.call(13, "")
    }

    pub fn trap(self) -> Script {
        self.call(14, "")
    }

    pub fn spin(self) -> Script {
        self.call(15, "")
    }

    pub fn recurse(self) -> Script {
        self.call(16, "")
    }

    pub fn grow_memory(self, pages: u32) -> Script {
        self.add(17, Place::Raw(0, pages))
    }

    pub fn grow_table(self, elements: u32) -> Script {
        self.add(18, Place::Raw(0, elements))
    }

    pub fn fill(mut self, address: u32, length: u32, byte: u8) -> Script {
        self = self.add(19, Place::Raw(address, length));
        self.0.last_mut().unwrap().value = byte.into();
        self
    }

    /// The body of a request that makes the puppet do all this.
    pub fn bytes(&self) -> Vec<u8> {
        let mut orders = Vec::new();
        let mut data = Vec::new();
        let base = 48 * u32::try_from(self.0.len()).unwrap();
        for order in &self.0 {
            let mut is_raw = 0u32;
            let mut place = |place: &Place| match place {
                Place::Bytes(bytes) => {
                    let address = base + u32::try_from(data.len()).unwrap();
                    data.extend_from_slice(bytes);
                    (address, u32::try_from(bytes.len()).unwrap())
                }
                Place::Raw(address, length) => {
                    is_raw = 1;
                    (*address, *length)
                }
            };
            let (first, second) = (place(&order.first), place(&order.second));
            let value = if order.value == 0 { second.1 } else { order.value };
            for number in [order.operation, first.0, first.1, second.0, value, order.times, is_raw, 0] {
                orders.extend_from_slice(&number.to_le_bytes());
            }
            orders.extend_from_slice(&order.numbers.0.to_le_bytes());
            orders.extend_from_slice(&order.numbers.1.to_le_bytes());
        }
        orders.append(&mut data);
        orders
    }
}

/// What the guest `handles` shall call; see there.
#[derive(Clone, Default)]
pub struct Calls(Vec<Call>);

#[derive(Clone)]
struct Call {
    operation: u32,
    arguments: [Argument; 5],
    numbers: (u64, u64),
    times: u32,
    kept: Option<u32>,
    value: u32,
    error: u32,
}

#[derive(Clone)]
enum Argument {
    Number(u32),
    Register(u32),
    /// The address of bytes that come with the calls.
    Bytes(Vec<u8>),
}

/// Operations of `handles`, with the place of the error in their results.
pub mod handles {
    pub const DIRECTORIES: (u32, u32) = (0, 0);
    pub const OPEN: (u32, u32) = (1, 4);
    pub const READ: (u32, u32) = (2, 4);
    pub const WRITE: (u32, u32) = (3, 8);
    pub const SET_SIZE: (u32, u32) = (4, 1);
    pub const ADVISE: (u32, u32) = (5, 1);
    pub const SYNC: (u32, u32) = (6, 1);
    pub const LIST: (u32, u32) = (7, 4);
    pub const NEXT_ENTRY: (u32, u32) = (8, 4);
    pub const MAKE_DIRECTORY: (u32, u32) = (9, 1);
    pub const REMOVE_DIRECTORY: (u32, u32) = (10, 1);
    pub const UNLINK: (u32, u32) = (11, 1);
    pub const READ_LINK: (u32, u32) = (12, 4);
    pub const RENAME: (u32, u32) = (13, 1);
    pub const SYMLINK: (u32, u32) = (14, 1);
    pub const LINK: (u32, u32) = (15, 1);
    pub const READ_STREAM: (u32, u32) = (16, 4);
    pub const WRITE_STREAM: (u32, u32) = (17, 4);
    pub const APPEND_STREAM: (u32, u32) = (18, 4);
    pub const DROP_DESCRIPTOR: (u32, u32) = (19, 0);
    pub const DROP_LISTING: (u32, u32) = (20, 0);
    pub const TAKE: (u32, u32) = (21, 4);
    pub const WAIT_AND_TAKE: (u32, u32) = (22, 4);
    pub const SKIP: (u32, u32) = (23, 8);
    pub const POLL_INPUT: (u32, u32) = (24, 0);
    pub const DROP_INPUT: (u32, u32) = (25, 0);
    pub const CHECK_WRITE: (u32, u32) = (26, 8);
    pub const PUT: (u32, u32) = (27, 4);
    pub const PUT_AND_WAIT: (u32, u32) = (28, 4);
    pub const FLUSH: (u32, u32) = (29, 4);
    pub const ZEROES: (u32, u32) = (30, 4);
    pub const SPLICE: (u32, u32) = (31, 8);
    pub const SPLICE_AND_WAIT: (u32, u32) = (32, 8);
    pub const POLL_OUTPUT: (u32, u32) = (33, 0);
    pub const DROP_OUTPUT: (u32, u32) = (34, 0);
    pub const READY: (u32, u32) = (35, 0);
    pub const BLOCK: (u32, u32) = (36, 0);
    pub const POLL: (u32, u32) = (37, 0);
    pub const DROP_POLLABLE: (u32, u32) = (38, 0);
    pub const NETWORK: (u32, u32) = (39, 0);
    pub const DROP_NETWORK: (u32, u32) = (40, 0);
    pub const TCP: (u32, u32) = (41, 4);
    pub const BIND: (u32, u32) = (42, 1);
    pub const FINISH_BIND: (u32, u32) = (43, 1);
    pub const CONNECT: (u32, u32) = (44, 1);
    pub const FINISH_CONNECT: (u32, u32) = (45, 4);
    pub const LISTEN: (u32, u32) = (46, 1);
    pub const FINISH_LISTEN: (u32, u32) = (47, 1);
    pub const ACCEPT: (u32, u32) = (48, 4);
    pub const BACKLOG: (u32, u32) = (49, 1);
    pub const KEEP_ALIVE: (u32, u32) = (50, 1);
    pub const BUFFER: (u32, u32) = (51, 1);
    pub const SHUT_DOWN: (u32, u32) = (52, 1);
    pub const POLL_TCP: (u32, u32) = (53, 0);
    pub const DROP_TCP: (u32, u32) = (54, 0);
    pub const UDP: (u32, u32) = (55, 4);
    pub const UDP_BIND: (u32, u32) = (56, 1);
    pub const UDP_FINISH_BIND: (u32, u32) = (57, 1);
    pub const UDP_STREAM: (u32, u32) = (58, 4);
    pub const DROP_UDP: (u32, u32) = (59, 0);
    pub const LOOK_UP: (u32, u32) = (60, 4);
    pub const NEXT_ADDRESS: (u32, u32) = (61, 2);
    pub const POLL_ADDRESSES: (u32, u32) = (62, 0);
    pub const DROP_ADDRESSES: (u32, u32) = (63, 0);
}

impl Calls {
    pub fn new() -> Calls {
        Calls::default()
    }

    /// Calls `operation` with zeroes, until more is said.
    pub fn call(mut self, (operation, error): (u32, u32)) -> Calls {
        let arguments = [const { Argument::Number(0) }; 5];
        self.0.push(Call { operation, arguments, numbers: (0, 0), times: 1, kept: None, value: 4, error });
        self
    }

    /// Calls `operation` with what is in that register.
    pub fn on(self, operation: (u32, u32), register: u32) -> Calls {
        self.call(operation).register(0, register)
    }

    fn last(&mut self) -> &mut Call {
        self.0.last_mut().unwrap()
    }

    pub fn number(mut self, index: usize, number: u32) -> Calls {
        self.last().arguments[index] = Argument::Number(number);
        self
    }

    pub fn register(mut self, index: usize, register: u32) -> Calls {
        self.last().arguments[index] = Argument::Register(register);
        self
    }

    /// The address of these bytes, and behind it their number.
    pub fn bytes_at(mut self, index: usize, bytes: impl AsRef<[u8]>) -> Calls {
        let bytes = bytes.as_ref().to_vec();
        self.last().arguments[index + 1] = Argument::Number(u32::try_from(bytes.len()).unwrap());
        self.last().arguments[index] = Argument::Bytes(bytes);
        self
    }

    pub fn numbers(mut self, x: u64, y: u64) -> Calls {
        self.last().numbers = (x, y);
        self
    }

    pub fn times(mut self, times: u32) -> Calls {
        self.last().times = times;
        self
    }

    /// Puts the handle that the last call gives into that register.
    pub fn keep(self, register: u32) -> Calls {
        self.keep_at(register, 4)
    }

    /// The same, for a handle at another place of the result.
    pub fn keep_at(mut self, register: u32, place: u32) -> Calls {
        self.last().kept = Some(register);
        self.last().value = place;
        self
    }

    /// Begins with `/tmp` in register 0 and `/data` in register 1.
    pub fn with_directories() -> Calls {
        let calls = Calls::new().call(handles::DIRECTORIES).keep_at(0, 0x10000);
        calls.call(handles::DIRECTORIES).keep_at(1, 0x10000 + 12)
    }

    /// Opens the file `name` for all in the directory, and makes it if need be.
    pub fn open(self, directory: u32, name: &str) -> Calls {
        self.on(handles::OPEN, directory).bytes_at(1, name).number(3, 1).number(4, 3)
    }

    /// The body of a request that makes the guest do all this.
    pub fn bytes(&self) -> Vec<u8> {
        let (mut orders, mut data) = (Vec::new(), Vec::new());
        let mut places = HashMap::new();
        let base = 64 * u32::try_from(self.0.len() + 1).unwrap();
        for call in &self.0 {
            let mut modes = 0;
            for number in [call.operation, call.times] {
                orders.extend_from_slice(&number.to_le_bytes());
            }
            for (index, argument) in call.arguments.iter().enumerate() {
                let (mode, value) = match argument {
                    Argument::Number(number) => (0u32, *number),
                    Argument::Register(register) => (1, *register),
                    Argument::Bytes(bytes) => {
                        // Once, however often they are used: all has to come with the call.
                        let address = *places.entry(bytes).or_insert_with(|| {
                            data.extend_from_slice(bytes);
                            base + u32::try_from(data.len() - bytes.len()).unwrap()
                        });
                        (2, address)
                    }
                };
                modes |= mode << (4 * index);
                orders.extend_from_slice(&value.to_le_bytes());
            }
            orders.extend_from_slice(&[0; 4]);
            orders.extend_from_slice(&call.numbers.0.to_le_bytes());
            orders.extend_from_slice(&call.numbers.1.to_le_bytes());
            for number in [modes, call.kept.unwrap_or(u32::MAX), call.value, call.error] {
                orders.extend_from_slice(&number.to_le_bytes());
            }
        }
        orders.extend_from_slice(&u32::MAX.to_le_bytes());
        orders.resize(base as usize, 0);
        orders.append(&mut data);
        assert!(orders.len() <= 64 << 10, "more than comes with the call");
        orders
    }
}
