/* A library that answers as libnvidia-ml.so.1 does, for tests: the unmodified nvidia-ml-py loads it.
 *
 * The state of the pretended machine is one file, named by FAKE_NVML_STATE and mapped by every process,
 * so that a lock outlives the process that set it, as with a real driver. layout.py mirrors it, and
 * machine.py writes it from the other side. A call takes flock on the file for its effect, never for its
 * injected delay: a killed process cannot leave it held, and a call that hangs holds up no other.
 *
 * What is modelled: locked clocks, a power cap that lowers the clock, time to settle, the energy counter,
 * event reasons, permissions, lost GPUs, driver reload, MIG mode, and any error or delay per function.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define EXPORT __attribute__((visibility("default")))

enum { /* return codes of NVML */
  OK = 0,
  UNINITIALIZED = 1,
  INVALID_ARGUMENT = 2,
  NOT_SUPPORTED = 3,
  NO_PERMISSION = 4,
  NOT_FOUND = 6,
  INSUFFICIENT_SIZE = 7,
  DRIVER_NOT_LOADED = 9,
  GPU_IS_LOST = 15,
  VERSION_MISMATCH = 25,
  UNKNOWN = 999,
};

enum { REASON_IDLE = 0x1, REASON_APPLICATION_CLOCKS = 0x2, REASON_POWER_CAP = 0x4 };

#define STATE_MAGIC 0x4c4d564e454b4146ull /* "FAKENVML" */
#define STATE_VERSION 1
#define GPUS_LIMIT 16
#define MEMORY_CLOCKS_LIMIT 4
#define CLOCKS_LIMIT 320
#define PROCESSES_LIMIT 8
#define FAULTS_LIMIT 32
#define FUNCTIONS_LIMIT 64
#define WRITES_LIMIT 4096
#define UNLIMITED_MHZ 0xffffff02u /* NVML's symbolic limits; mixing them with numbers is an error */
#define TDP_MHZ 0xffffff01u

/* Every structure below is mirrored in layout.py; fields are ordered so that no padding is needed. */
typedef struct {
  char uuid[96];
  char name[96];
  int32_t memory_clocks_count;
  int32_t memory_clocks_mhz[MEMORY_CLOCKS_LIMIT];
  int32_t clocks_count[MEMORY_CLOCKS_LIMIT];
  int32_t clocks_mhz[MEMORY_CLOCKS_LIMIT][CLOCKS_LIMIT]; /* falling, as NVML gives them */
  int32_t lock_minimum_mhz;                             /* 0: no lock */
  int32_t lock_maximum_mhz;
  int32_t application_clock_mhz; /* 0: default */
  int32_t application_clocks_code;
  int32_t ceiling_mhz; /* what the firmware allows beside lock and power; 0: everything */
  int32_t lost;
  int32_t mig_supported;
  int32_t mig_enabled;
  int32_t persistence;
  int32_t temperature_celsius;
  int32_t module_power; /* whether MODULE scope is answered too */
  int32_t processes_count;
  int32_t processes_pid[PROCESSES_LIMIT];
  int32_t steady_mhz;   /* what the clock is on its way to */
  int32_t previous_mhz; /* what it shows until it has settled */
  int32_t compute_major;
  int32_t compute_minor;
  uint64_t ceiling_reasons; /* event reasons given while the ceiling binds */
  double changed_seconds;
  double settle_seconds;
  double load_ratio;
  double idle_watts; /* no context */
  double context_watts;      /* a live context at the highest clock, beyond that */
  double busy_watts;         /* full load at the highest clock */
  double module_watts;       /* what MODULE scope adds */
  double power_limit_watts;
  double power_limit_default_watts;
  double power_limit_minimum_watts;
  double power_limit_maximum_watts;
  double energy_joules;
  double energy_seconds; /* when it was brought up to date */
  double energy_wrap_millijoules; /* 0: 64 bits */
} Gpu;

typedef struct {
  char function[56];   /* exported name, FieldValue<id>[.<scope>], or * for all */
  int32_t gpu;         /* -1: any */
  int32_t code;        /* 0: only the delay */
  int32_t remaining;   /* -1: until removed; 0: free slot */
  int32_t hang;        /* block until the slot is free */
  double delay_minimum_seconds;
  double delay_maximum_seconds;
} Fault;

typedef struct {
  char function[56];
  int64_t calls_count;
} Function;

typedef struct {
  int64_t sequence_number;
  double time_seconds;
  int32_t pid;
  int32_t gpu;
  uint32_t minimum; /* MHz; power limits in mW */
  uint32_t maximum;
  int32_t kind; /* 1 lock, 2 reset, 3 power limit, 4 memory lock */
  int32_t code; /* what was answered */
} Write;

typedef struct {
  uint64_t magic;
  int32_t version;
  int32_t bytes;
  int32_t loaded;
  int32_t generation; /* rises with every driver reload */
  int32_t gpus_count;
  int32_t permission; /* 0 all may write, 1 only with CAP_SYS_ADMIN, 2 nobody */
  int32_t time_virtual;
  int32_t cuda_version;
  double time_seconds; /* virtual time */
  char driver_version[80];
  int64_t writes_count;
  Gpu gpus[GPUS_LIMIT];
  Fault faults[FAULTS_LIMIT];
  Function functions[FUNCTIONS_LIMIT];
  Write writes[WRITES_LIMIT];
} State;

static State *state;
static int state_descriptor = -1;
static int initialized; /* count of inits not yet shut down */
static int generation;
static char handles[GPUS_LIMIT]; /* a device handle is the address of its byte */
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;

static void lock_state(void) {
  pthread_mutex_lock(&mutex);
  while (flock(state_descriptor, LOCK_EX) != 0 && errno == EINTR) {
  }
}

static void unlock_state(void) {
  flock(state_descriptor, LOCK_UN);
  pthread_mutex_unlock(&mutex);
}

static double now_seconds(void) {
  struct timespec now;
  if (state->time_virtual) return state->time_seconds;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

static void wait_seconds(double seconds) {
  struct timespec left = {(time_t)seconds, (long)(1e9 * (seconds - (double)(time_t)seconds))};
  while (nanosleep(&left, &left) != 0 && errno == EINTR) {
  }
}

/* Whether this thread has CAP_SYS_ADMIN in effect, which is what the kernel module asks. */
static int privileged(void) {
  struct { uint32_t version; int32_t pid; } header = {0x20080522, 0};
  struct { uint32_t effective, permitted, inheritable; } data[2];
  memset(data, 0, sizeof data);
  if (syscall(SYS_capget, &header, data) != 0) return geteuid() == 0;
  return (int)(data[0].effective >> 21 & 1u);
}

static int may_write(void) {
  return state->permission == 0 || (state->permission == 1 && privileged());
}

/* ---- faults and the call count ---- */

static void count_call(const char *function) {
  for (int i = 0; i < FUNCTIONS_LIMIT; i++) {
    Function *entry = &state->functions[i];
    if (entry->function[0] == 0) snprintf(entry->function, sizeof entry->function, "%s", function);
    if (strcmp(entry->function, function) == 0) {
      entry->calls_count++;
      return;
    }
  }
}

/* The code to answer instead, after the delay; 0 for none. Called without the lock. */
static int injected(const char *function, int gpu) {
  double delay = 0;
  int code = OK;
  lock_state();
  count_call(function); /* before the delay, so that a test sees a call that hangs */
  for (int i = 0; i < FAULTS_LIMIT; i++) {
    Fault *fault = &state->faults[i];
    if (fault->remaining == 0 || (fault->gpu >= 0 && fault->gpu != gpu)) continue;
    if (strcmp(fault->function, "*") != 0 && strcmp(fault->function, function) != 0) continue;
    while (fault->hang && fault->remaining != 0) {
      unlock_state();
      wait_seconds(1e-3);
      lock_state();
    }
    double spread = fault->delay_maximum_seconds - fault->delay_minimum_seconds;
    delay += fault->delay_minimum_seconds + spread * ((double)random() / RAND_MAX);
    if (code == OK) code = fault->code;
    if (fault->remaining > 0) fault->remaining--;
  }
  unlock_state();
  if (delay > 0) wait_seconds(delay);
  return code;
}

static void log_write(int kind, int gpu, unsigned minimum, unsigned maximum, int code) {
  Write *entry = &state->writes[state->writes_count % WRITES_LIMIT];
  *entry = (Write){state->writes_count, now_seconds(), getpid(), gpu, minimum, maximum, kind, code};
  state->writes_count++;
}

/* ---- physics, rough on purpose: falling clocks cost less, a cap lowers the clock ---- */

static int main_table(const Gpu *gpu) {
  int best = 0;
  for (int i = 1; i < gpu->memory_clocks_count; i++)
    if (gpu->memory_clocks_mhz[i] > gpu->memory_clocks_mhz[best]) best = i;
  return best;
}

static int highest_mhz(const Gpu *gpu) { return gpu->clocks_mhz[main_table(gpu)][0]; }

static int lowest_mhz(const Gpu *gpu) {
  int table = main_table(gpu);
  return gpu->clocks_mhz[table][gpu->clocks_count[table] - 1];
}

static double watts_at(const Gpu *gpu, int clock_mhz) {
  double ratio = (double)clock_mhz / highest_mhz(gpu);
  double idle = gpu->idle_watts + (gpu->processes_count > 0 ? gpu->context_watts * ratio * ratio : 0);
  double full = gpu->busy_watts - gpu->idle_watts - gpu->context_watts;
  return idle + gpu->load_ratio * full * ratio * ratio * ratio;
}

static int snapped(const Gpu *gpu, int limit_mhz) {
  int table = main_table(gpu);
  for (int i = 0; i < gpu->clocks_count[table]; i++)
    if (gpu->clocks_mhz[table][i] <= limit_mhz) return gpu->clocks_mhz[table][i];
  return lowest_mhz(gpu);
}

/* Where the clock is heading, and why it is not higher. */
static int steady(const Gpu *gpu, uint64_t *reasons) {
  int table = main_table(gpu);
  int wanted = highest_mhz(gpu);
  *reasons = 0;
  if (gpu->lock_maximum_mhz > 0) wanted = snapped(gpu, gpu->lock_maximum_mhz);
  if (gpu->application_clock_mhz > 0 && gpu->application_clock_mhz < wanted && gpu->lock_maximum_mhz == 0) {
    wanted = snapped(gpu, gpu->application_clock_mhz);
    *reasons |= REASON_APPLICATION_CLOCKS;
  }
  if (gpu->load_ratio <= 0) {
    *reasons |= REASON_IDLE;
    if (gpu->processes_count == 0) return snapped(gpu, gpu->lock_minimum_mhz);
  }
  if (gpu->ceiling_mhz > 0 && gpu->ceiling_mhz < wanted) {
    wanted = snapped(gpu, gpu->ceiling_mhz);
    *reasons |= gpu->ceiling_reasons;
  }
  for (int i = 0; i < gpu->clocks_count[table]; i++) {
    int clock = gpu->clocks_mhz[table][i];
    if (clock > wanted) continue;
    if (watts_at(gpu, clock) <= gpu->power_limit_watts || i == gpu->clocks_count[table] - 1) {
      if (clock < wanted) *reasons |= REASON_POWER_CAP;
      return clock;
    }
  }
  return lowest_mhz(gpu);
}

static int observed_mhz(const Gpu *gpu) {
  int settled = now_seconds() - gpu->changed_seconds >= gpu->settle_seconds;
  return settled ? gpu->steady_mhz : gpu->previous_mhz;
}

/* Brings clock and energy up to now; what a test changed counts from the call before on. */
static void settle(Gpu *gpu) {
  uint64_t reasons;
  int target = steady(gpu, &reasons);
  if (target != gpu->steady_mhz) {
    gpu->previous_mhz = gpu->steady_mhz == 0 ? target : observed_mhz(gpu);
    gpu->changed_seconds = now_seconds();
    gpu->steady_mhz = target;
  }
  double now = now_seconds();
  if (now > gpu->energy_seconds) {
    gpu->energy_joules += watts_at(gpu, observed_mhz(gpu)) * (now - gpu->energy_seconds);
    gpu->energy_seconds = now;
  }
}

/* ---- the frame of a call ---- */

static int gpu_index(const void *device) {
  const char *byte = device;
  if (byte < handles || byte >= handles + GPUS_LIMIT) return -1;
  return (int)(byte - handles);
}

/* Holds the lock when it returns OK. */
static int enter(const char *function, const void *device, Gpu **gpu) {
  int index = gpu_index(device);
  if (!initialized) return UNINITIALIZED;
  if (index < 0 || index >= state->gpus_count) return INVALID_ARGUMENT;
  int code = injected(function, index);
  lock_state();
  if (code == OK && (generation != state->generation || !state->loaded)) code = UNKNOWN;
  if (code == OK && state->gpus[index].lost) code = GPU_IS_LOST;
  if (code != OK) {
    unlock_state();
    return code;
  }
  *gpu = &state->gpus[index];
  settle(*gpu);
  return OK;
}

#define ENTER(device)                                \
  Gpu *gpu;                                          \
  int entered = enter(__func__, device, &gpu);       \
  if (entered != OK) return entered

static int leave(int code) {
  unlock_state();
  return code;
}

static int enter_system(const char *function) {
  if (!initialized) return UNINITIALIZED;
  int code = injected(function, -1);
  lock_state();
  if (code == OK && (generation != state->generation || !state->loaded)) code = UNKNOWN;
  if (code != OK) unlock_state();
  return code;
}

#define ENTER_SYSTEM()                               \
  int entered = enter_system(__func__);              \
  if (entered != OK) return entered

static int copy_text(const char *text, char *into, unsigned bytes) {
  if (into == NULL) return INVALID_ARGUMENT;
  if (strlen(text) + 1 > bytes) return INSUFFICIENT_SIZE;
  strcpy(into, text);
  return OK;
}

/* ---- life ---- */

/* NVML does not survive fork: a child must initialize anew. */
static void in_child(void) {
  pthread_mutex_init(&mutex, NULL);
  initialized = 0;
}

__attribute__((constructor)) static void on_load(void) { pthread_atfork(NULL, NULL, in_child); }

static int map_state(void) {
  const char *path = getenv("FAKE_NVML_STATE");
  struct stat status;
  if (path == NULL) return DRIVER_NOT_LOADED;
  int descriptor = open(path, O_RDWR | O_CLOEXEC);
  if (descriptor < 0) return DRIVER_NOT_LOADED;
  if (fstat(descriptor, &status) != 0 || status.st_size != (off_t)sizeof(State)) {
    close(descriptor);
    return DRIVER_NOT_LOADED;
  }
  State *mapped = mmap(NULL, sizeof(State), PROT_READ | PROT_WRITE, MAP_SHARED, descriptor, 0);
  if (mapped == MAP_FAILED || mapped->magic != STATE_MAGIC || mapped->version != STATE_VERSION) {
    close(descriptor);
    return DRIVER_NOT_LOADED;
  }
  /* An earlier file stays mapped: a thread may still be inside a call on it. */
  state = mapped;
  state_descriptor = descriptor;
  return OK;
}

EXPORT int nvmlInitWithFlags(unsigned flags) {
  (void)flags;
  pthread_mutex_lock(&mutex);
  int code = initialized > 0 ? OK : map_state();
  pthread_mutex_unlock(&mutex);
  if (code != OK) return code;
  code = injected(__func__, -1);
  lock_state();
  if (code == OK && !state->loaded) code = DRIVER_NOT_LOADED;
  if (code == OK) {
    if (initialized == 0) generation = state->generation;
    initialized++;
  }
  return leave(code);
}

EXPORT int nvmlInit_v2(void) { return nvmlInitWithFlags(0); }

EXPORT int nvmlShutdown(void) { /* locks stay, as with a real driver */
  pthread_mutex_lock(&mutex);
  int code = initialized > 0 ? OK : UNINITIALIZED;
  if (initialized > 0) initialized--;
  pthread_mutex_unlock(&mutex);
  return code;
}

EXPORT const char *nvmlErrorString(int code) {
  switch (code) {
    case OK: return "Success";
    case UNINITIALIZED: return "Uninitialized";
    case INVALID_ARGUMENT: return "Invalid Argument";
    case NOT_SUPPORTED: return "Not Supported";
    case NO_PERMISSION: return "Insufficient Permissions";
    case NOT_FOUND: return "Not Found";
    case INSUFFICIENT_SIZE: return "Insufficient Size";
    case DRIVER_NOT_LOADED: return "Driver Not Loaded";
    case GPU_IS_LOST: return "GPU is lost";
    case VERSION_MISMATCH: return "Argument version mismatch";
    default: return "Unknown Error";
  }
}

/* ---- the system ---- */

EXPORT int nvmlSystemGetDriverVersion(char *version, unsigned bytes) {
  ENTER_SYSTEM();
  return leave(copy_text(state->driver_version, version, bytes));
}

EXPORT int nvmlSystemGetNVMLVersion(char *version, unsigned bytes) {
  ENTER_SYSTEM();
  return leave(copy_text("13.615.71", version, bytes));
}

EXPORT int nvmlSystemGetCudaDriverVersion_v2(int *version) {
  ENTER_SYSTEM();
  *version = state->cuda_version;
  return leave(OK);
}

EXPORT int nvmlDeviceGetCount_v2(unsigned *count) {
  ENTER_SYSTEM();
  *count = (unsigned)state->gpus_count;
  return leave(OK);
}

EXPORT int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **device) {
  ENTER_SYSTEM();
  if (index >= (unsigned)state->gpus_count) return leave(INVALID_ARGUMENT);
  *device = &handles[index];
  return leave(state->gpus[index].lost ? GPU_IS_LOST : OK);
}

EXPORT int nvmlDeviceGetHandleByUUID(const char *uuid, void **device) {
  ENTER_SYSTEM();
  for (int i = 0; i < state->gpus_count; i++) {
    if (strcmp(state->gpus[i].uuid, uuid) != 0) continue;
    *device = &handles[i];
    return leave(state->gpus[i].lost ? GPU_IS_LOST : OK);
  }
  return leave(NOT_FOUND);
}

/* ---- what a GPU is ---- */

EXPORT int nvmlDeviceGetUUID(void *device, char *uuid, unsigned bytes) {
  ENTER(device);
  return leave(copy_text(gpu->uuid, uuid, bytes));
}

EXPORT int nvmlDeviceGetName(void *device, char *name, unsigned bytes) {
  ENTER(device);
  return leave(copy_text(gpu->name, name, bytes));
}

EXPORT int nvmlDeviceGetIndex(void *device, unsigned *index) {
  ENTER(device);
  *index = (unsigned)gpu_index(device);
  return leave(OK);
}

EXPORT int nvmlDeviceGetCudaComputeCapability(void *device, int *major, int *minor) {
  ENTER(device);
  *major = gpu->compute_major;
  *minor = gpu->compute_minor;
  return leave(OK);
}

EXPORT int nvmlDeviceGetPersistenceMode(void *device, unsigned *mode) {
  ENTER(device);
  *mode = (unsigned)gpu->persistence;
  return leave(OK);
}

EXPORT int nvmlDeviceGetMigMode(void *device, unsigned *current, unsigned *pending) {
  ENTER(device);
  if (!gpu->mig_supported) return leave(NOT_SUPPORTED);
  *current = *pending = (unsigned)gpu->mig_enabled;
  return leave(OK);
}

/* ---- clocks ---- */

static int copy_clocks(const int32_t *from, int count, unsigned *given, unsigned *into) {
  unsigned room = *given;
  *given = (unsigned)count;
  if (into == NULL || room < (unsigned)count) return count == 0 ? OK : INSUFFICIENT_SIZE;
  for (int i = 0; i < count; i++) into[i] = (unsigned)from[i];
  return OK;
}

EXPORT int nvmlDeviceGetSupportedMemoryClocks(void *device, unsigned *count, unsigned *clocks) {
  ENTER(device);
  return leave(copy_clocks(gpu->memory_clocks_mhz, gpu->memory_clocks_count, count, clocks));
}

EXPORT int nvmlDeviceGetSupportedGraphicsClocks(void *device, unsigned memory_mhz, unsigned *count,
                                                unsigned *clocks) {
  ENTER(device);
  for (int i = 0; i < gpu->memory_clocks_count; i++)
    if (gpu->memory_clocks_mhz[i] == (int32_t)memory_mhz)
      return leave(copy_clocks(gpu->clocks_mhz[i], gpu->clocks_count[i], count, clocks));
  return leave(NOT_FOUND);
}

EXPORT int nvmlDeviceGetClockInfo(void *device, unsigned type, unsigned *clock_mhz) {
  ENTER(device);
  if (type > 3) return leave(INVALID_ARGUMENT);
  *clock_mhz = (unsigned)(type == 2 ? gpu->memory_clocks_mhz[main_table(gpu)] : observed_mhz(gpu));
  return leave(OK);
}

EXPORT int nvmlDeviceGetMaxClockInfo(void *device, unsigned type, unsigned *clock_mhz) {
  ENTER(device);
  if (type > 3) return leave(INVALID_ARGUMENT);
  *clock_mhz = (unsigned)(type == 2 ? gpu->memory_clocks_mhz[main_table(gpu)] : highest_mhz(gpu));
  return leave(OK);
}

static int application_clock(Gpu *gpu, unsigned type, unsigned *clock_mhz, int32_t sm_mhz) {
  if (gpu->application_clocks_code != OK) return gpu->application_clocks_code;
  if (type > 3) return INVALID_ARGUMENT;
  *clock_mhz = (unsigned)(type == 2 ? gpu->memory_clocks_mhz[main_table(gpu)] : sm_mhz);
  return OK;
}

EXPORT int nvmlDeviceGetApplicationsClock(void *device, unsigned type, unsigned *clock_mhz) {
  ENTER(device);
  int32_t sm = gpu->application_clock_mhz > 0 ? gpu->application_clock_mhz : highest_mhz(gpu);
  return leave(application_clock(gpu, type, clock_mhz, sm));
}

EXPORT int nvmlDeviceGetDefaultApplicationsClock(void *device, unsigned type, unsigned *clock_mhz) {
  ENTER(device);
  return leave(application_clock(gpu, type, clock_mhz, highest_mhz(gpu)));
}

EXPORT int nvmlDeviceSetGpuLockedClocks(void *device, unsigned minimum, unsigned maximum) {
  ENTER(device);
  int code = OK;
  int symbols = (minimum >= TDP_MHZ) + (maximum >= TDP_MHZ);
  if (!may_write())
    code = NO_PERMISSION;
  else if (symbols == 1 || (symbols == 0 && (minimum > maximum || maximum == 0)))
    code = INVALID_ARGUMENT;
  else if (symbols == 2) /* only the whole range is modelled: a reset */
    gpu->lock_minimum_mhz = gpu->lock_maximum_mhz = 0;
  else {
    gpu->lock_minimum_mhz = (int32_t)minimum;
    gpu->lock_maximum_mhz = (int32_t)maximum;
  }
  log_write(1, gpu_index(device), minimum, maximum, code);
  settle(gpu);
  return leave(code);
}

EXPORT int nvmlDeviceResetGpuLockedClocks(void *device) {
  ENTER(device);
  int code = may_write() ? OK : NO_PERMISSION;
  if (code == OK) gpu->lock_minimum_mhz = gpu->lock_maximum_mhz = 0;
  log_write(2, gpu_index(device), 0, 0, code);
  settle(gpu);
  return leave(code);
}

/* Memory clocks are left alone by design; the log shows whoever does not. */
EXPORT int nvmlDeviceSetMemoryLockedClocks(void *device, unsigned minimum, unsigned maximum) {
  ENTER(device);
  log_write(4, gpu_index(device), minimum, maximum, NOT_SUPPORTED);
  return leave(NOT_SUPPORTED);
}

EXPORT int nvmlDeviceGetCurrentClocksEventReasons(void *device, unsigned long long *reasons) {
  ENTER(device);
  uint64_t found;
  steady(gpu, &found);
  *reasons = found;
  return leave(OK);
}

/* ---- power, energy, temperature ---- */

static unsigned milliwatts(double watts) { return (unsigned)(watts * 1e3 + 0.5); }

static unsigned long long millijoules(const Gpu *gpu) {
  double total = gpu->energy_joules * 1e3;
  if (gpu->energy_wrap_millijoules > 0)
    total -= gpu->energy_wrap_millijoules * (double)(uint64_t)(total / gpu->energy_wrap_millijoules);
  return (unsigned long long)total;
}

EXPORT int nvmlDeviceGetPowerUsage(void *device, unsigned *power) {
  ENTER(device);
  *power = milliwatts(watts_at(gpu, observed_mhz(gpu)));
  return leave(OK);
}

EXPORT int nvmlDeviceGetTotalEnergyConsumption(void *device, unsigned long long *energy) {
  ENTER(device);
  *energy = millijoules(gpu);
  return leave(OK);
}

EXPORT int nvmlDeviceGetPowerManagementLimit(void *device, unsigned *limit) {
  ENTER(device);
  *limit = milliwatts(gpu->power_limit_watts);
  return leave(OK);
}

EXPORT int nvmlDeviceGetEnforcedPowerLimit(void *device, unsigned *limit) {
  ENTER(device);
  *limit = milliwatts(gpu->power_limit_watts);
  return leave(OK);
}

EXPORT int nvmlDeviceGetPowerManagementDefaultLimit(void *device, unsigned *limit) {
  ENTER(device);
  *limit = milliwatts(gpu->power_limit_default_watts);
  return leave(OK);
}

EXPORT int nvmlDeviceGetPowerManagementLimitConstraints(void *device, unsigned *low, unsigned *high) {
  ENTER(device);
  *low = milliwatts(gpu->power_limit_minimum_watts);
  *high = milliwatts(gpu->power_limit_maximum_watts);
  return leave(OK);
}

EXPORT int nvmlDeviceSetPowerManagementLimit(void *device, unsigned limit) {
  ENTER(device);
  int code = OK;
  if (!may_write())
    code = NO_PERMISSION;
  else if (limit < milliwatts(gpu->power_limit_minimum_watts) ||
           limit > milliwatts(gpu->power_limit_maximum_watts))
    code = INVALID_ARGUMENT;
  else
    gpu->power_limit_watts = limit / 1e3;
  log_write(3, gpu_index(device), limit, limit, code);
  settle(gpu);
  return leave(code);
}

EXPORT int nvmlDeviceGetTemperature(void *device, unsigned sensor, unsigned *celsius) {
  ENTER(device);
  if (sensor != 0) return leave(INVALID_ARGUMENT);
  *celsius = (unsigned)gpu->temperature_celsius;
  return leave(OK);
}

typedef struct {
  uint32_t version;
  uint32_t sensor;
  int32_t temperature;
} Temperature;

EXPORT int nvmlDeviceGetTemperatureV(void *device, Temperature *temperature) {
  ENTER(device);
  if (temperature->version != (sizeof(Temperature) | 1u << 24)) return leave(VERSION_MISMATCH);
  if (temperature->sensor != 0) return leave(INVALID_ARGUMENT);
  temperature->temperature = gpu->temperature_celsius;
  return leave(OK);
}

typedef struct {
  uint32_t gpu;
  uint32_t memory;
} Utilization;

EXPORT int nvmlDeviceGetUtilizationRates(void *device, Utilization *utilization) {
  ENTER(device);
  utilization->gpu = utilization->memory = (uint32_t)(100.0 * gpu->load_ratio + 0.5);
  return leave(OK);
}

typedef struct {
  uint32_t field;
  uint32_t scope;
  int64_t timestamp;
  int64_t latency;
  uint32_t value_type; /* 1 unsigned int, 3 unsigned long long */
  int32_t code;
  union {
    uint32_t unsigned_int;
    uint64_t unsigned_long_long;
  } value;
} FieldValue;

static int field_value(Gpu *gpu, FieldValue *value) {
  double watts = watts_at(gpu, observed_mhz(gpu));
  if (value->scope > 1 || (value->scope == 1 && !gpu->module_power)) return NOT_SUPPORTED;
  if (value->scope == 1) watts += gpu->module_watts;
  value->timestamp = (int64_t)(now_seconds() * 1e6);
  if (value->field == 83) {
    value->value_type = 3;
    value->value.unsigned_long_long = millijoules(gpu);
    return OK;
  }
  if (value->field != 185 && value->field != 186) return NOT_SUPPORTED;
  value->value_type = 1;
  value->value.unsigned_int = milliwatts(watts);
  return OK;
}

EXPORT int nvmlDeviceGetFieldValues(void *device, int count, FieldValue *values) {
  char name[32];
  int codes[16] = {0};
  if (count < 1 || count > 16) return INVALID_ARGUMENT;
  for (int i = 0; initialized && i < count; i++) {
    if (values[i].scope == 0)
      snprintf(name, sizeof name, "FieldValue%u", values[i].field);
    else
      snprintf(name, sizeof name, "FieldValue%u.%u", values[i].field, values[i].scope);
    codes[i] = injected(name, gpu_index(device));
  }
  ENTER(device);
  for (int i = 0; i < count; i++)
    values[i].code = codes[i] != OK ? codes[i] : field_value(gpu, &values[i]);
  return leave(OK);
}

/* ---- processes ---- */

typedef struct {
  uint32_t pid;
  uint64_t memory;
  uint32_t gpu_instance;
  uint32_t compute_instance;
} ProcessInfo;

EXPORT int nvmlDeviceGetComputeRunningProcesses_v3(void *device, unsigned *count, ProcessInfo *infos) {
  ENTER(device);
  unsigned room = *count;
  *count = (unsigned)gpu->processes_count;
  if (*count == 0) return leave(OK);
  if (infos == NULL || room < *count) return leave(INSUFFICIENT_SIZE);
  for (unsigned i = 0; i < *count; i++)
    infos[i] = (ProcessInfo){(uint32_t)gpu->processes_pid[i], 1ull << 30, ~0u, ~0u};
  return leave(OK);
}

/* ---- for the tests of the fake itself ---- */

/* Bytes of a structure as this compiler lays it out. */
EXPORT int fakeNvmlStructureBytes(const char *name) {
  if (strcmp(name, "State") == 0) return (int)sizeof(State);
  if (strcmp(name, "Gpu") == 0) return (int)sizeof(Gpu);
  if (strcmp(name, "Fault") == 0) return (int)sizeof(Fault);
  if (strcmp(name, "Function") == 0) return (int)sizeof(Function);
  if (strcmp(name, "Write") == 0) return (int)sizeof(Write);
  if (strcmp(name, "Temperature") == 0) return (int)sizeof(Temperature);
  if (strcmp(name, "FieldValue") == 0) return (int)sizeof(FieldValue);
  if (strcmp(name, "ProcessInfo") == 0) return (int)sizeof(ProcessInfo);
  if (strcmp(name, "Utilization") == 0) return (int)sizeof(Utilization);
  return 0;
}
