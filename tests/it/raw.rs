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
