//! Takes the state out of core modules: memory with its data, and the start
//! values of globals.
//!
//! A module with state becomes one that imports it from [`TENANT`]:
//!
//! | before                               | after                                        |
//! |--------------------------------------|----------------------------------------------|
//! | `(memory $m 206)` and all `(data)`   | `(import "tenant" "memory" (memory $m 1))`   |
//! | `(global $g (mut i32) (i32.const 7))`| `(import "tenant" "start:0" (global $s i32))`|
//! |                                      | `(global $g (mut i32) (global.get $s))`      |
//!
//! Only those globals are taken out that a program changes on its own behalf,
//! so that they may differ after a snapshot: the stack pointer, and all that
//! are not exported. The others are a linker's tables of addresses, which are
//! equal for all apps; what is left in a module can be folded to constants.

use std::collections::HashSet;

use anyhow::{Context as _, Result, bail, ensure};
use wasm_encoder::reencode::{Error, Reencode, utils};
use wasm_encoder::{
    CodeSection, ConstExpr, EntityType, ExportKind, ExportSection, FunctionSection, GlobalSection,
    GlobalType, ImportSection, MemorySection, MemoryType, Module, ModuleType, RawSection, SectionId,
    StartSection, TypeSection, ValType,
};
use wasmparser::{DataKind, ExternalKind, Operator, TypeRef};

use crate::TENANT;
use crate::core_module::CoreModule;
use crate::written::{PAGE, Writes};

/// Name of the tenant's memory.
pub(crate) const MEMORY: &str = "memory";

/// The modules of a component without their state.
pub(crate) struct Hollowed {
    /// For each module what it becomes, if it had state.
    pub(crate) modules: Vec<Option<Vec<u8>>>,
    /// The tenant module: all that was taken out.
    pub(crate) tenant: Vec<u8>,
    /// What the skeleton demands of a tenant module.
    pub(crate) tenant_type: ModuleType,
    /// The first page of memory that has data.
    pub(crate) first_page: u32,
}

/// A global whose start value goes to the tenant.
struct StartValue {
    module: usize,
    /// Index of the global in its module.
    global: u32,
    value: i32,
    /// Name of the value in the tenant module.
    name: String,
}

/// The type of a start value.
const START_VALUE: GlobalType = GlobalType { val_type: ValType::I32, mutable: false, shared: false };

impl Hollowed {
    /// Takes the state out of `modules`. The tenant module writes to the pages
    /// `written` when it is instantiated.
    pub(crate) fn of(modules: &[CoreModule<'_>], written: &[u32]) -> Result<Hollowed> {
        let holder = memory_holder(modules)?;
        let start_values = start_values(modules)?;
        // With the least minimum that the importers accept and no maximum,
        // tenants with memories of any size have the same type.
        let memory = MemoryType {
            minimum: largest_imported_minimum(modules)?,
            maximum: None,
            memory64: false,
            shared: false,
            page_size_log2: None,
        };
        let mut tenant_type = ModuleType::new();
        tenant_type.export(MEMORY, EntityType::Memory(memory));
        for start_value in &start_values {
            tenant_type.export(&start_value.name, EntityType::Global(START_VALUE));
        }
        let hollow = |(index, module): (usize, &CoreModule<'_>)| {
            let own = start_values.iter().filter(|value| value.module == index).collect::<Vec<_>>();
            let memory = (index == holder).then_some(memory);
            if own.is_empty() && memory.is_none() {
                return Ok(None);
            }
            Hollow::new(module, memory, own)?.rewrite(module).map(Some)
        };
        let (tenant, first_page) = tenant(&modules[holder], &start_values, written)?;
        Ok(Hollowed {
            modules: modules.iter().enumerate().map(hollow).collect::<Result<_>>()?,
            tenant,
            tenant_type,
            first_page,
        })
    }

    /// Index of the tenant module in the skeleton: behind the others.
    pub(crate) fn tenant_index(&self) -> u32 {
        u32::try_from(self.modules.len()).unwrap_or(u32::MAX)
    }
}

/// The module that defines the one memory.
fn memory_holder(modules: &[CoreModule<'_>]) -> Result<usize> {
    let mut holders = modules.iter().enumerate().filter(|(_, module)| !module.memories.is_empty());
    let (index, holder) = holders.next().context("it has no memory")?;
    ensure!(
        holders.next().is_none() && holder.memories.len() == 1 && holder.imported.memories.is_empty(),
        "it has more than one memory"
    );
    let memory = holder.memories[0];
    ensure!(
        !memory.memory64 && !memory.shared && memory.page_size_log2.is_none(),
        "its memory is of a kind that is not known here"
    );
    Ok(index)
}

fn largest_imported_minimum(modules: &[CoreModule<'_>]) -> Result<u64> {
    let mut largest = 0;
    for import in modules.iter().flat_map(|module| &module.imported.memories) {
        if let TypeRef::Memory(memory) = import.ty {
            ensure!(memory.maximum.is_none(), "a module wants a memory of limited size");
            largest = largest.max(memory.initial);
        }
    }
    Ok(largest)
}

/// The globals whose start values go to the tenant.
fn start_values(modules: &[CoreModule<'_>]) -> Result<Vec<StartValue>> {
    let mut start_values = Vec::new();
    for (index, module) in modules.iter().enumerate() {
        let first = module.imported.globals.len();
        let of_linker = module
            .exports
            .values()
            .filter(|export| export.kind == ExternalKind::Global && export.name != "__stack_pointer")
            .map(|export| export.index)
            .collect::<HashSet<_>>();
        for (global, number) in module.globals.iter().zip(first..) {
            if !global.ty.mutable || global.ty.content_type != wasmparser::ValType::I32 {
                continue;
            }
            let number = u32::try_from(number)?;
            let mut operators = global.init_expr.get_operators_reader();
            if !of_linker.contains(&number)
                && let Operator::I32Const { value } = operators.read()?
            {
                ensure!(operators.is_end_then_eof(), "a global starts with a computed value");
                let name = format!("start:{}", start_values.len());
                start_values.push(StartValue { module: index, global: number, value, name });
            }
        }
    }
    Ok(start_values)
}

/// The module with the memory and data of `holder`, the start values, and a start
/// function that writes to the pages `written`; and the first page with data.
fn tenant(holder: &CoreModule<'_>, start_values: &[StartValue], written: &[u32]) -> Result<(Vec<u8>, u32)> {
    let memory = holder.memories[0];
    let mut writes = Writes::new(written, memory.initial << 16)?;
    let mut first = u32::MAX;
    if let Some(data) = &holder.data {
        for segment in data.clone() {
            let segment = segment?;
            let DataKind::Active { memory_index: 0, offset_expr } = segment.kind else {
                bail!("it has data that is not in memory from the start");
            };
            let Operator::I32Const { value } = offset_expr.get_operators_reader().read()? else {
                bail!("it has data at a computed address");
            };
            writes.take(value.cast_unsigned(), segment.data);
            first = first.min(value.cast_unsigned());
        }
    }
    let mut tenant = Module::new();
    if !writes.is_empty() {
        let (mut types, mut functions) = (TypeSection::new(), FunctionSection::new());
        types.ty().function([], []);
        functions.function(0);
        tenant.section(&types).section(&functions);
    }
    let mut memories = MemorySection::new();
    memories.memory(MemoryType {
        minimum: memory.initial,
        maximum: memory.maximum,
        memory64: false,
        shared: false,
        page_size_log2: None,
    });
    tenant.section(&memories);
    let mut globals = GlobalSection::new();
    let mut exports = ExportSection::new();
    exports.export(MEMORY, ExportKind::Memory, 0);
    for (start_value, index) in start_values.iter().zip(0..) {
        globals.global(START_VALUE, &ConstExpr::i32_const(start_value.value));
        exports.export(&start_value.name, ExportKind::Global, index);
    }
    tenant.section(&globals).section(&exports);
    if !writes.is_empty() {
        let mut code = CodeSection::new();
        code.function(&writes.function());
        tenant.section(&StartSection { function_index: 0 }).section(&code);
    }
    if let Some(data) = &holder.data {
        let data = holder.bytes.get(data.range()).context("data without end")?;
        tenant.section(&RawSection { id: SectionId::Data.into(), data });
    }
    Ok((tenant.finish(), first / PAGE))
}

/// Rewrites one module.
struct Hollow<'a> {
    /// What the memory becomes, if the module defined it.
    memory: Option<MemoryType>,
    start_values: Vec<&'a StartValue>,
    imported_globals: u32,
    /// The index, in the original, of the next global to be written.
    next_global: u32,
}

impl<'a> Hollow<'a> {
    fn new(
        module: &CoreModule<'_>,
        memory: Option<MemoryType>,
        start_values: Vec<&'a StartValue>,
    ) -> Result<Hollow<'a>> {
        ensure!(!module.imports.is_empty(), "a module with state imports nothing");
        ensure!(module.imports.iter().all(|import| import.module != TENANT), "a module imports a `{TENANT}`");
        let imported_globals = u32::try_from(module.imported.globals.len())?;
        Ok(Hollow { memory, start_values, imported_globals, next_global: imported_globals })
    }

    fn rewrite(mut self, module: &CoreModule<'_>) -> Result<Vec<u8>> {
        let mut rewritten = Module::new();
        self.parse_core_module(&mut rewritten, wasmparser::Parser::new(0), module.bytes)
            .context("failed to rewrite a module with state")?;
        Ok(rewritten.finish())
    }
}

type Reencoded<T> = Result<T, Error<std::convert::Infallible>>;

impl Reencode for Hollow<'_> {
    type Error = std::convert::Infallible;

    /// Start values are imported behind the other imports.
    fn global_index(&mut self, global: u32) -> Reencoded<u32> {
        let added = u32::try_from(self.start_values.len()).unwrap_or(u32::MAX);
        Ok(if global < self.imported_globals { global } else { global.saturating_add(added) })
    }

    fn parse_import_section(
        &mut self,
        imports: &mut ImportSection,
        section: wasmparser::ImportSectionReader<'_>,
    ) -> Reencoded<()> {
        utils::parse_import_section(self, imports, section)?;
        if let Some(memory) = self.memory {
            imports.import(TENANT, MEMORY, memory);
        }
        for start_value in &self.start_values {
            imports.import(TENANT, &start_value.name, START_VALUE);
        }
        Ok(())
    }

    fn parse_global(&mut self, globals: &mut GlobalSection, global: wasmparser::Global<'_>) -> Reencoded<()> {
        let number = self.next_global;
        self.next_global += 1;
        match self.start_values.iter().zip(self.imported_globals..).find(|(value, _)| value.global == number)
        {
            Some((_, start_value)) => {
                let global_type = self.global_type(global.ty)?;
                globals.global(global_type, &ConstExpr::global_get(start_value));
                Ok(())
            }
            None => utils::parse_global(self, globals, global),
        }
    }

    fn parse_memory_section(
        &mut self,
        memories: &mut MemorySection,
        section: wasmparser::MemorySectionReader<'_>,
    ) -> Reencoded<()> {
        if self.memory.is_some() { Ok(()) } else { utils::parse_memory_section(self, memories, section) }
    }

    fn parse_data_section(
        &mut self,
        data: &mut wasm_encoder::DataSection,
        section: wasmparser::DataSectionReader<'_>,
    ) -> Reencoded<()> {
        if self.memory.is_some() { Ok(()) } else { utils::parse_data_section(self, data, section) }
    }

    /// Left out with the data. Code that reads data segments is not valid
    /// without them, which is found when the skeleton is compiled.
    fn data_count(&mut self, count: u32) -> Reencoded<u32> {
        Ok(if self.memory.is_some() { 0 } else { count })
    }
}
