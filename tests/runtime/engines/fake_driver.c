/* A pretend libcuda.so.1 for test_probe.py; the environment says what it does:
   FAKE_VERSION 13000, FAKE_FAIL cuInit=803 (a function and its CUresult), FAKE_GPUS "NVIDIA H200:90;NVIDIA L4:89". */
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int fails(const char *function) {
    const char *said = getenv("FAKE_FAIL");
    size_t length = strlen(function);
    return said && !strncmp(said, function, length) && said[length] == '=' ? atoi(said + length + 1) : 0;
}

static int gpu(int wanted, char *name, int *sm) { /* how many there are */
    char copy[512], *save = NULL;
    const char *said = getenv("FAKE_GPUS"), *visible = getenv("CUDA_VISIBLE_DEVICES");
    int count = 0;
    if (!said || (visible && (!*visible || *visible == '-')))
        return 0;
    snprintf(copy, sizeof copy, "%s", said);
    for (char *each = strtok_r(copy, ";", &save); each; each = strtok_r(NULL, ";", &save), count++)
        if (count == wanted)
            sscanf(each, "%255[^:]:%d", name, sm);
    return count;
}

int cuDriverGetVersion(int *version) {
    *version = getenv("FAKE_VERSION") ? atoi(getenv("FAKE_VERSION")) : 13000;
    return fails("cuDriverGetVersion");
}

int cuInit(unsigned flags) {
    if (fails("cuInit"))
        return fails("cuInit");
    return gpu(-1, NULL, NULL) || getenv("FAKE_ZERO") ? 0 : 100;
}

int cuDeviceGetCount(int *count) {
    *count = gpu(-1, NULL, NULL);
    return fails("cuDeviceGetCount");
}

int cuDeviceGet(int *device, int index) {
    *device = index;
    return fails("cuDeviceGet");
}

int cuDeviceGetName(char *name, int size, int device) {
    char full[256] = "";
    int sm = 0;
    gpu(device, full, &sm);
    snprintf(name, (size_t)size, "%s", full);
    return fails("cuDeviceGetName");
}

int cuDeviceTotalMem_v2(size_t *bytes, int device) {
    *bytes = ((size_t)140 << 30) - (size_t)device;
    return fails("cuDeviceTotalMem_v2");
}

int cuDeviceGetAttribute(int *value, int attribute, int device) {
    char name[256];
    int sm = 0;
    gpu(device, name, &sm);
    *value = attribute == 75 ? sm / 10 : attribute == 76 ? sm % 10 : -1;
    return fails("cuDeviceGetAttribute");
}

int cuGetErrorString(int status, const char **text) {
    *text = status == 803 ? "system has unsupported display driver / cuda driver combination" : NULL;
    return *text ? 0 : 1;
}
