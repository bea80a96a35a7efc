//! The core instances of a skeleton and what each gets from which.

use std::collections::HashMap;

use anyhow::{Context as _, Result, bail, ensure};
use wasmparser::{
    CanonicalFunction, ComponentAlias, ComponentAliasSectionReader, ComponentCanonicalSectionReader,
    ExternalKind, Instance, InstanceSectionReader,
};

use crate::core_module::CoreModule;
use crate::sections::{Section, id, sections};
use crate::shim::{self, Shim};

/// A skeleton as [`crate::split()`] made it.
pub(crate) struct Graph<'a> {
    pub(crate) sections: Vec<Section<'a>>,
    /// The modules with code, in the order of their indices. The tenant's
    /// index is the one behind the last.
    pub(crate) modules: Vec<CoreModule<'a>>,
    /// The order in which `modules` are instantiated, the shim and the module
    /// that fills it left out.
    pub(crate) order: Vec<usize>,
    instances: Vec<CoreInstance<'a>>,
    /// For each module its instance.
    instance_of: HashMap<usize, usize>,
    functions: Vec<Item<'a>>,
    tables: Vec<Item<'a>>,
    memories: Vec<Item<'a>>,
    globals: Vec<Item<'a>>,
    shim: Option<Shim>,
}

/// A core instance.
enum CoreInstance<'a> {
    /// Of the module with this index, with these instances as arguments.
    Module(usize, HashMap<&'a str, u32>),
    /// Items under names.
    Items(HashMap<&'a str, (ExternalKind, u32)>),
}

/// What stands at a place of one of the component's core index spaces.
#[derive(Clone, Copy)]
enum Item<'a> {
    /// The export of a core instance.
    Export(u32, &'a str),
    /// A function that a canonical definition makes.
    Canonical,
}

/// Where an item comes from in the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Origin<'a> {
    /// A module defines it, under this index of the module.
    Module(usize, ExternalKind, u32),
    /// It is the core function with this index, made by a canonical
    /// definition: a call to the host.
    Canonical(u32),
    /// The tenant exports it under this name.
    Tenant(&'a str),
}

impl<'a> Graph<'a> {
    /// Reads a skeleton, which must be valid.
    pub(crate) fn read(skeleton: &'a [u8]) -> Result<Graph<'a>> {
        let sections = sections(skeleton)?;
        let modules = sections
            .iter()
            .filter(|section| section.id == id::CORE_MODULE)
            .map(|section| CoreModule::read(section.content))
            .collect::<Result<Vec<_>>>()?;
        let shim = Shim::find(&modules)?;
        let mut graph = Graph {
            sections,
            modules,
            order: Vec::new(),
            instances: Vec::new(),
            instance_of: HashMap::new(),
            functions: Vec::new(),
            tables: Vec::new(),
            memories: Vec::new(),
            globals: Vec::new(),
            shim,
        };
        for section in graph.sections.clone() {
            match section.id {
                id::CORE_INSTANCE => {
                    for instance in InstanceSectionReader::new(section.reader())? {
                        graph.add_instance(instance?)?;
                    }
                }
                id::ALIAS => {
                    for alias in ComponentAliasSectionReader::new(section.reader())? {
                        if let ComponentAlias::CoreInstanceExport { kind, instance_index, name } = alias? {
                            graph.space(kind)?.push(Item::Export(instance_index, name));
                        }
                    }
                }
                id::CANONICAL => {
                    for function in ComponentCanonicalSectionReader::new(section.reader())? {
                        if !matches!(function?, CanonicalFunction::Lift { .. }) {
                            graph.functions.push(Item::Canonical);
                        }
                    }
                }
                _ => {}
            }
        }
        Ok(graph)
    }

    fn add_instance(&mut self, instance: Instance<'a>) -> Result<()> {
        let index = self.instances.len();
        let instance = match instance {
            Instance::Instantiate { module_index, args } => {
                let module = module_index as usize;
                let again = self.instance_of.insert(module, index).is_some();
                ensure!(!again, "module {module} is instantiated more than once");
                let is_code = module < self.modules.len();
                if is_code && !self.shim.as_ref().is_some_and(|shim| shim.has(module)) {
                    self.order.push(module);
                }
                CoreInstance::Module(module, args.iter().map(|arg| (arg.name, arg.index)).collect())
            }
            Instance::FromExports(exports) => CoreInstance::Items(
                exports.iter().map(|export| (export.name, (export.kind, export.index))).collect(),
            ),
        };
        self.instances.push(instance);
        Ok(())
    }

    /// The index space of core items of `kind`.
    fn space(&mut self, kind: ExternalKind) -> Result<&mut Vec<Item<'a>>> {
        match kind {
            ExternalKind::Func => Ok(&mut self.functions),
            ExternalKind::Table => Ok(&mut self.tables),
            ExternalKind::Memory => Ok(&mut self.memories),
            ExternalKind::Global => Ok(&mut self.globals),
            ExternalKind::Tag | ExternalKind::FuncExact => bail!("an alias of a kind that is not known here"),
        }
    }

    /// Where the component's core function `index` comes from.
    pub(crate) fn function(&self, index: u32) -> Result<Origin<'a>> {
        self.follow(Place::Item(ExternalKind::Func, index))
    }

    /// Where the component's core memory `index` comes from.
    pub(crate) fn memory(&self, index: u32) -> Result<Origin<'a>> {
        self.follow(Place::Item(ExternalKind::Memory, index))
    }

    /// Where the item comes from that has the index `index` in `module`.
    pub(crate) fn in_module(&self, module: usize, kind: ExternalKind, index: u32) -> Result<Origin<'a>> {
        self.follow(Place::InModule(module, kind, index))
    }

    /// Follows exports, arguments and aliases to where an item is defined.
    fn follow(&self, mut place: Place<'a>) -> Result<Origin<'a>> {
        // An instance gets its items from earlier ones, except through the
        // shim. A longer way than past all of them goes round in a circle.
        for _ in 0..self.instances.len() * 4 + 4 {
            place = match place {
                Place::Item(kind, index) => {
                    let space = match kind {
                        ExternalKind::Func => &self.functions,
                        ExternalKind::Table => &self.tables,
                        ExternalKind::Memory => &self.memories,
                        _ => &self.globals,
                    };
                    match *space.get(index as usize).context("an index out of range")? {
                        Item::Canonical => return Ok(Origin::Canonical(index)),
                        Item::Export(instance, name) => Place::Export(instance, name),
                    }
                }
                Place::Export(instance, name) => match self.step(instance, name)? {
                    Step::Place(place) => place,
                    Step::Origin(origin) => return Ok(origin),
                },
                Place::InModule(module, kind, index) => {
                    let code = self.modules.get(module).context("an index out of range")?;
                    let Some(import) = code.imports_of(kind)?.get(index as usize) else {
                        return Ok(Origin::Module(module, kind, index));
                    };
                    Place::Export(self.argument(module, import.module)?, import.name)
                }
            };
        }
        bail!("modules import from one another in a circle")
    }

    /// What the instance exports under `name`.
    fn step(&self, instance: u32, name: &'a str) -> Result<Step<'a>> {
        let instance = self.instances.get(instance as usize).context("an index out of range")?;
        Ok(Step::Place(match instance {
            CoreInstance::Items(items) => {
                let (kind, index) = items.get(name).with_context(|| format!("nothing exports `{name}`"))?;
                Place::Item(*kind, *index)
            }
            CoreInstance::Module(module, _) if *module == self.modules.len() => {
                return Ok(Step::Origin(Origin::Tenant(name)));
            }
            CoreInstance::Module(module, _) => match &self.shim {
                // What the shim calls under this name is what is given to the
                // module that fills the shim's table.
                Some(shim) if shim.module == *module && shim.is_function(name) => {
                    Place::Export(self.argument(shim.filler, shim::ARGUMENT)?, name)
                }
                _ => {
                    let code = self.modules.get(*module).context("an index out of range")?;
                    let export =
                        code.exports.get(name).with_context(|| format!("nothing exports `{name}`"))?;
                    Place::InModule(*module, export.kind, export.index)
                }
            },
        }))
    }

    /// The instance that `module` gets as its argument `name`.
    fn argument(&self, module: usize, name: &str) -> Result<u32> {
        let instance = self.instance_of.get(&module).and_then(|index| self.instances.get(*index));
        match instance {
            Some(CoreInstance::Module(_, arguments)) => {
                arguments.get(name).copied().with_context(|| format!("nothing is given as `{name}`"))
            }
            _ => bail!("module {module} is not instantiated"),
        }
    }
}

/// A place on the way to where an item is defined.
enum Place<'a> {
    /// The component's core item of this kind and index.
    Item(ExternalKind, u32),
    /// The export of the core instance with this index.
    Export(u32, &'a str),
    /// A module's item of this kind and index.
    InModule(usize, ExternalKind, u32),
}

/// Where a step leads.
enum Step<'a> {
    Place(Place<'a>),
    Origin(Origin<'a>),
}
