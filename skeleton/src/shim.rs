//! The indirection by which wit-component breaks a circle.
//!
//! Calls to the host need the memory and the allocator of the modules that
//! import them. So wit-component first instantiates a *shim*: functions that
//! call through a table. The libraries import those. At last a module that
//! only has an element segment, here called the *filler*, puts the calls to
//! the host into the table. In one module there is no circle, so both modules
//! are left out, and a function of the shim stands for what the filler puts
//! into its slot. All is checked here that makes this the same.

use anyhow::{Context as _, Result, bail, ensure};
use wasmparser::{ElementItems, ElementKind, ExternalKind, Operator, TableInit};

use crate::core_module::CoreModule;

/// Name of the table in both modules.
const TABLE: &str = "$imports";
/// Name of the filler's one argument.
pub(crate) const ARGUMENT: &str = "";

/// The two modules.
pub(crate) struct Shim {
    /// Index of the module with the functions.
    pub(crate) module: usize,
    /// Index of the module that fills the table.
    pub(crate) filler: usize,
    /// Number of functions. They are named by their slots.
    slots: usize,
}

impl Shim {
    /// Finds the two among `modules`, if they are there.
    pub(crate) fn find(modules: &[CoreModule<'_>]) -> Result<Option<Shim>> {
        let exports = |module: &CoreModule<'_>| module.exports.contains_key(TABLE);
        let imports = |module: &CoreModule<'_>| module.imports.iter().any(|import| import.name == TABLE);
        let shim = single(modules, exports)?;
        let filler = single(modules, imports)?;
        match (shim, filler) {
            (None, None) => Ok(None),
            (Some(module), Some(filler)) => {
                let slots = check_shim(&modules[module]).context("the shim is not as expected")?;
                check_filler(&modules[filler], slots)
                    .context("the module that fills the shim is not as expected")?;
                Ok(Some(Shim { module, filler, slots }))
            }
            _ => bail!("it has one half of a shim"),
        }
    }

    /// Whether `module` is one of the two.
    pub(crate) fn has(&self, module: usize) -> bool {
        module == self.module || module == self.filler
    }

    /// Whether the shim exports a function `name`.
    pub(crate) fn is_function(&self, name: &str) -> bool {
        slot(name).is_some_and(|slot| slot < self.slots)
    }
}

/// The index of the one module that `fits`.
fn single(modules: &[CoreModule<'_>], fits: impl Fn(&CoreModule<'_>) -> bool) -> Result<Option<usize>> {
    let mut found = modules.iter().enumerate().filter(|(_, module)| fits(module)).map(|(index, _)| index);
    let first = found.next();
    ensure!(found.next().is_none(), "it has more than one shim");
    Ok(first)
}

/// The slot that a function is named by, in the one way to write the number.
fn slot(name: &str) -> Option<usize> {
    name.parse().ok().filter(|slot: &usize| slot.to_string() == name)
}

/// Checks that each function calls what is in its slot, with its own
/// arguments, and that nothing else is there. Returns the number of slots.
fn check_shim(module: &CoreModule<'_>) -> Result<usize> {
    let slots = module.bodies.len();
    ensure!(
        module.imports.is_empty()
            && module.memories.is_empty()
            && module.globals.is_empty()
            && module.elements.is_empty()
            && module.data.is_none()
            && !module.has_start,
        "it has more than functions and a table"
    );
    ensure!(
        matches!(&module.tables[..], [table] if matches!(table.init, TableInit::RefNull)),
        "it has more than one table"
    );
    ensure!(module.exports.len() == slots + 1, "it has exports that are not known here");
    for export in module.exports.values() {
        if export.name == TABLE {
            ensure!(export.kind == ExternalKind::Table, "its table is none");
            continue;
        }
        let slot = slot(export.name).filter(|slot| *slot < slots).context("an export is not a slot")?;
        ensure!(export.kind == ExternalKind::Func, "an export is not a function");
        check_trampoline(module, export.index, slot)?;
    }
    Ok(slots)
}

/// Checks that `function` passes its arguments to what is in `slot`.
fn check_trampoline(module: &CoreModule<'_>, function: u32, slot: usize) -> Result<()> {
    let own_type = module.function_type(function)?;
    let body = module.bodies.get(function as usize).context("a function without a body")?;
    ensure!(body.get_locals_reader()?.get_count() == 0, "a function has variables");
    let mut operators = body.get_operators_reader()?;
    for parameter in 0..own_type.params().len() {
        let is_next = matches!(operators.read()?, Operator::LocalGet { local_index } if local_index as usize == parameter);
        ensure!(is_next, "a function does not pass its arguments on");
    }
    let is_slot =
        matches!(operators.read()?, Operator::I32Const { value } if usize::try_from(value) == Ok(slot));
    ensure!(is_slot, "a function is not named by its slot");
    match operators.read()? {
        Operator::CallIndirect { type_index, table_index: 0 }
            if module.types.get(type_index as usize) == Some(own_type) => {}
        _ => bail!("a function does not call what is in its slot"),
    }
    ensure!(
        matches!(operators.read()?, Operator::End) && operators.eof(),
        "a function does more than a call"
    );
    Ok(())
}

/// Checks that the module puts its imported functions into the slots that
/// they are named by, all of them, and does nothing else.
fn check_filler(module: &CoreModule<'_>, slots: usize) -> Result<()> {
    ensure!(
        module.bodies.is_empty()
            && module.memories.is_empty()
            && module.globals.is_empty()
            && module.tables.is_empty()
            && module.exports.is_empty()
            && module.data.is_none()
            && !module.has_start,
        "it has more than elements"
    );
    let functions = &module.imported.functions;
    ensure!(
        module.imports.iter().all(|import| import.module == ARGUMENT)
            && module.imports.len() == slots + 1
            && module.imported.tables.len() == 1
            && functions.len() == slots
            && functions.iter().enumerate().all(|(index, import)| slot(import.name) == Some(index)),
        "it imports something that is not known here"
    );
    let [element] = &module.elements[..] else { bail!("it has more than one element segment") };
    let (ElementKind::Active { table_index: None | Some(0), offset_expr }, ElementItems::Functions(items)) =
        (&element.kind, &element.items)
    else {
        bail!("its elements are not in the table from the start")
    };
    let mut offset = offset_expr.get_operators_reader();
    let is_zero = matches!(offset.read()?, Operator::I32Const { value: 0 }) && offset.is_end_then_eof();
    ensure!(is_zero, "its elements do not start with slot 0");
    let items = items.clone().into_iter().collect::<Result<Vec<_>, _>>()?;
    let in_order = items.iter().enumerate().all(|(index, function)| *function as usize == index);
    ensure!(items.len() == slots && in_order, "its elements are not in order");
    Ok(())
}
