/* A libnvidia-ml.so.1 without a GPU: a board that behaves as a script says, in a time that tests move.
 *
 * The script is the file that FAKE_NVML_SCRIPT names, read by nvmlInit; a line is `name value`:
 *   tick_s 0.02        seconds between two ticks of the energy counter
 *   idle_w 70          power with nothing running
 *   query_s 0.00005    how long each query takes
 *   energy 0           the counter is not supported
 *   instant 0          momentary power is not supported
 *   mig 1              the board is split
 *   boards 2           a second board, on which nothing runs
 *   init 18            nvmlInit answers with this code
 *   energy_error 4     the counter answers with this code
 *   process 4242       one more process on the board; 0 stands for the caller
 *   at 1.5 reset       at that time the counter starts again from 0
 *   at 1.5 throttle 64 at that time these reasons hold the clocks down
 *   at 1.5 process 99  at that time one more process comes
 *   at 1.5 lost 1      at that time the GPU falls off the bus
 *   at 1.5 ecc 2       at that time there are that many memory errors
 */
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { SUCCESS = 0, UNINITIALIZED = 1, NOT_SUPPORTED = 3, NOT_FOUND = 6, INSUFFICIENT_SIZE = 7, LOST = 15 };
enum { MOST_EVENTS = 32, MOST_PROCESSES = 8, POWER_INSTANT = 186 };

static const char* const UUIDS[] = {"GPU-00000000-1111-2222-3333-444444444444",
                                    "GPU-00000000-1111-2222-3333-555555555555"};

typedef struct {
  double time_s;
  char what[16];
  double value;
} Event;

typedef struct {
  unsigned pid;
  unsigned long long used_bytes;
  unsigned instance, compute_instance;
} Process;

typedef struct {
  unsigned field, scope;
  int64_t timestamp, latency_us;
  unsigned type;
  int code;
  uint64_t value;
} FieldValue;

static double now_s, tick_s, idle_w, work_w, pending_s, query_s, exact_mj, counted_mj;
static int handles[2];  /* the address of one is a board */
static int boards, users, energy, instant, mig, init_code, energy_code, lost, event_count, process_count;
static unsigned long long throttle, ecc;
static unsigned processes[MOST_PROCESSES];
static Event events[MOST_EVENTS];

static void happen(const char* what, double value) {
  if (!strcmp(what, "reset")) exact_mj = counted_mj = 0;
  if (!strcmp(what, "throttle")) throttle = (unsigned long long)value;
  if (!strcmp(what, "lost")) lost = (int)value;
  if (!strcmp(what, "ecc")) ecc = (unsigned long long)value;
  if (!strcmp(what, "process") && process_count < MOST_PROCESSES)
    processes[process_count++] = value ? (unsigned)value : (unsigned)getpid();
}

/* What the board draws: work that was given to it runs until it is done. */
static double power_w(void) { return pending_s > 0 ? work_w : idle_w; }

/* Moves time on.  The counter takes in the exact energy at each tick. */
static void pass(double seconds) {
  double end_s = now_s + seconds;
  while (now_s < end_s) {
    double tick = (floor(now_s / tick_s + 1e-9) + 1) * tick_s, next = fmin(tick, end_s);
    if (pending_s > 0) next = fmin(next, now_s + pending_s);
    Event* due = NULL;
    for (int i = 0; i < event_count; i++)
      if (events[i].what[0] && events[i].time_s <= next) due = &events[i], next = fmax(now_s, due->time_s);
    exact_mj += power_w() * (next - now_s) * 1e3;
    pending_s = fmax(0, pending_s - (next - now_s));
    if (pending_s < 1e-12) pending_s = 0;
    now_s = next;
    if (due) {
      happen(due->what, due->value);
      due->what[0] = 0;
    } else if (next == tick) {
      counted_mj = exact_mj;
    }
  }
}

static int query(void) {
  if (!users) return UNINITIALIZED;
  pass(query_s);
  return lost ? LOST : SUCCESS;
}

static void defaults(void) {
  now_s = exact_mj = counted_mj = pending_s = 0;
  tick_s = 0.02, idle_w = 70, query_s = 0.00005;
  energy = instant = boards = 1;
  mig = init_code = energy_code = lost = event_count = process_count = 0;
  throttle = ecc = 0;
}

static void read_script(void) {
  const char* path = getenv("FAKE_NVML_SCRIPT");
  FILE* file = path ? fopen(path, "r") : NULL;
  char line[128], name[16];
  double value;
  while (file && fgets(line, sizeof line, file)) {
    Event event = {0};
    if (sscanf(line, "at %lf %15s %lf", &event.time_s, event.what, &event.value) >= 2) {
      if (event_count < MOST_EVENTS) events[event_count++] = event;
      continue;
    }
    if (sscanf(line, "%15s %lf", name, &value) != 2) continue;
    if (!strcmp(name, "tick_s")) tick_s = value;
    if (!strcmp(name, "idle_w")) idle_w = value;
    if (!strcmp(name, "query_s")) query_s = value;
    if (!strcmp(name, "energy")) energy = (int)value;
    if (!strcmp(name, "instant")) instant = (int)value;
    if (!strcmp(name, "mig")) mig = (int)value;
    if (!strcmp(name, "boards")) boards = (int)value;
    if (!strcmp(name, "init")) init_code = (int)value;
    if (!strcmp(name, "energy_error")) energy_code = (int)value;
    if (!strcmp(name, "process")) happen("process", value);
  }
  if (file) fclose(file);
}

/* For the tests: the time, work that goes on until it is waited for, and how often the library is held. */
double fake_now(void) { return now_s; }
int fake_users(void) { return users; }
void fake_wait(double seconds) { pass(seconds); }
void fake_call(double seconds, double watts) {
  pending_s += seconds;
  work_w = watts;
}
void fake_synchronize(void) { pass(pending_s); }

int nvmlInitWithFlags(unsigned flags) {
  (void)flags;
  if (!users) {
    defaults();
    read_script();
  }
  if (init_code) return init_code;
  users++;
  return SUCCESS;
}
int nvmlShutdown(void) { return users > 0 ? (users--, SUCCESS) : UNINITIALIZED; }
const char* nvmlErrorString(int code) {
  static char text[32];
  snprintf(text, sizeof text, "code %d", code);
  return text;
}
int nvmlDeviceGetCount_v2(unsigned* count) { return *count = (unsigned)boards, query(); }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void** device) {
  if (index >= (unsigned)boards) return 2;
  *device = &handles[index];
  return query();
}
int nvmlDeviceGetHandleByUUID(const char* uuid, void** device) {
  for (int i = 0; i < boards; i++) {
    *device = &handles[i];
    if (!strcmp(uuid, UUIDS[i])) return query();
  }
  return NOT_FOUND;
}
int nvmlDeviceGetUUID(void* device, char* uuid, unsigned length) {
  snprintf(uuid, length, "%s", UUIDS[device == &handles[1]]);
  return query();
}
int nvmlDeviceGetMigMode(void* device, unsigned* current, unsigned* pending) {
  (void)device;
  *current = *pending = (unsigned)mig;
  return query();
}
int nvmlDeviceGetTotalEnergyConsumption(void* device, unsigned long long* mj) {
  int code = query();
  double idle_mj = floor(now_s / tick_s) * tick_s * idle_w * 1e3;
  *mj = (unsigned long long)(device == &handles[1] ? idle_mj : counted_mj);
  return code ? code : energy_code ? energy_code : energy ? SUCCESS : NOT_SUPPORTED;
}
int nvmlDeviceGetPowerUsage(void* device, unsigned* mw) {
  (void)device;
  *mw = (unsigned)(power_w() * 1e3);
  return query();
}
int nvmlDeviceGetFieldValues(void* device, int count, FieldValue* values) {
  (void)device;
  for (int i = 0; i < count; i++) {
    values[i].code = values[i].field == POWER_INSTANT && instant ? SUCCESS : NOT_SUPPORTED;
    values[i].value = (uint64_t)(power_w() * 1e3);
  }
  return query();
}
int nvmlDeviceGetCurrentClocksEventReasons(void* device, unsigned long long* reasons) {
  (void)device;
  return *reasons = throttle, query();
}
int nvmlDeviceGetClockInfo(void* device, unsigned kind, unsigned* mhz) {
  (void)device, (void)kind;
  return *mhz = throttle ? 900 : 1980, query();
}
int nvmlDeviceGetTotalEccErrors(void* device, unsigned kind, unsigned counter, unsigned long long* count) {
  (void)device, (void)kind, (void)counter;
  return *count = ecc, query();
}
int nvmlDeviceGetComputeRunningProcesses_v3(void* device, unsigned* count, Process* found) {
  (void)device;
  unsigned room = *count;
  *count = (unsigned)process_count;
  if (process_count && (!found || room < *count)) return INSUFFICIENT_SIZE;
  for (int i = 0; i < process_count; i++) found[i] = (Process){processes[i], 1 << 20, 0, 0};
  return query();
}
